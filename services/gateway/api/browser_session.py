"""A browser's session: the key in a cookie that scripts cannot read, for what cannot send an Authorization header.

The cookie holds the key itself. So every gateway knows it, and it ends with the key.
"""

from typing import Any, Literal

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.datastructures import Cookie
from litestar.di import NamedDependency

from services.gateway.api.docs.openapi import problems
from services.gateway.api.responses import NO_STORE
from services.gateway.auth.api_keys import Caller, Limits
from services.gateway.auth.authenticate import COOKIE, COOKIE_SECONDS

AnyRequest = Request[Any, Any, Any]


class SessionBody(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, and what they may have."""

    tenant: str
    limits: Limits


@get("/api/session", responses=problems(401))
async def session(caller: NamedDependency[Caller]) -> Response[SessionBody]:
    """Whose key this is. Without keys everybody is the tenant `local`."""
    return Response(SessionBody(tenant=caller.tenant, limits=caller.limits), headers=NO_STORE)


@post("/api/session", status_code=204, responses=problems(401))
async def begin(request: AnyRequest, caller: NamedDependency[Caller]) -> Response[None]:
    """Put the key of the Authorization header into a cookie."""
    key = request.headers.get("authorization", "").partition(" ")[2].strip()
    cookies = [_cookie(request, key, COOKIE_SECONDS)] if key else []
    return Response(None, headers=NO_STORE, cookies=cookies)


@delete("/api/session", status_code=204, responses=problems(401))
async def end(request: AnyRequest, caller: NamedDependency[Caller]) -> Response[None]:
    """Take the cookie away."""
    return Response(None, headers=NO_STORE, cookies=[_cookie(request, "", 0)])


def _cookie(request: AnyRequest, value: str, seconds: int) -> Cookie:
    strict: Literal["strict"] = "strict"
    # uvicorn believes X-Forwarded-Proto from this machine alone, and the scheme is what it found.
    secure = request.scope["scheme"] == "https"
    return Cookie(key=COOKIE, value=value, path="/", max_age=seconds, httponly=True, samesite=strict, secure=secure)


ROUTES = (session, begin, end)
