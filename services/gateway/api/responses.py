"""Methods and headers that several routes have in common."""

from litestar.enums import HttpMethod

GET_AND_HEAD = [HttpMethod.GET, HttpMethod.HEAD]
NO_STORE = {"Cache-Control": "no-store"}
