"""What several routes need for their responses."""

from litestar.enums import HttpMethod

GET_AND_HEAD = [HttpMethod.GET, HttpMethod.HEAD]
NO_STORE = {"Cache-Control": "no-store"}
