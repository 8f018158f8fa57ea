"""What the responses of several routes have in common: methods, headers, waiting for a client to leave."""

from litestar.enums import HttpMethod
from litestar.types import Receive

GET_AND_HEAD = [HttpMethod.GET, HttpMethod.HEAD]
NO_STORE = {"Cache-Control": "no-store"}


async def until_gone(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
