"""The address of MCP: streamable HTTP without sessions, which takes POST alone."""

from typing import Any

from litestar import Request, post
from litestar.di import NamedDependency
from litestar.types import ASGIApp

from services.gateway.auth.api_keys import Caller
from services.gateway.errors import ApiError
from services.gateway.mcp.endpoint import McpEndpoint
from shared.schema.request import MAX_BODY


@post("/mcp", status_code=200, include_in_schema=False)
async def mcp(
    request: Request[Any, Any, Any], mcp_endpoint: NamedDependency[McpEndpoint], caller: NamedDependency[Caller]
) -> ASGIApp:
    """Answer a message of an agent. Its schema is MCP's own; the tools describe themselves."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > MAX_BODY:
        raise ApiError(413, "too-large", f"a message may have at most {MAX_BODY // 1024} KiB")
    host = request.headers.get("host") or ":".join(map(str, request.scope["server"] or ("localhost",)))
    return await mcp_endpoint.answer_to(caller, f"{request.scope['scheme']}://{host}")


ROUTES = (mcp,)
