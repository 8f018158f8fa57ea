"""Bodies of requests that are JSON."""

from typing import Any

from litestar import Request
from litestar.exceptions import InternalServerException

from services.gateway.errors import ApiError


async def json_of(request: Request[Any, Any, Any]) -> bytes:
    """The bytes of a JSON body, to be decoded strictly by the caller. Raises a 408 or 415 `ApiError`."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # This also keeps out what pages of other sites may send without a preflight request.
    if media_type != "application/json":
        raise ApiError(415, "unsupported-media-type", "send JSON, with Content-Type: application/json")
    try:
        return await request.body()
    except InternalServerException:  # Litestar's error for a client that leaves before it has sent everything
        raise ApiError(408, "refused", "the connection ended before the whole body was there") from None
