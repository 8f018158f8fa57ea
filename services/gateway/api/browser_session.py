"""Sessions of browsers: the API key in a cookie that scripts cannot read.

Audio elements and websockets of a page cannot send an Authorization header. The cookie holds the key itself, so every
gateway accepts it, and it ends with the key.
"""

from typing import Any, Literal

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.datastructures import Cookie
from litestar.di import NamedDependency

from services.gateway.api.docs.openapi import problems
from services.gateway.api.responses import NO_STORE
from services.gateway.auth.api_keys import Caller, Limits
from services.gateway.auth.authenticate import COOKIE, COOKIE_SECONDS, key_in_headers

AnyRequest = Request[Any, Any, Any]


class SessionBody(msgspec.Struct, frozen=True, kw_only=True):
    """The tenant that asks, and its limits."""

    tenant: str
    limits: Limits


@get("/api/session", responses=problems(401))
async def session(caller: NamedDependency[Caller]) -> Response[SessionBody]:
    """The tenant of the key. Without keys every caller is the tenant `local`."""
    return Response(SessionBody(tenant=caller.tenant, limits=caller.limits), headers=NO_STORE)


@post("/api/session", status_code=204, responses=problems(401))
async def begin(request: AnyRequest, caller: NamedDependency[Caller]) -> Response[None]:
    """Put the key of the Authorization header into a cookie."""
    key = key_in_headers(request) or ""
    cookies = [_cookie(request, key, COOKIE_SECONDS)] if key else []
    return Response(None, headers=NO_STORE, cookies=cookies)


@delete("/api/session", status_code=204, responses=problems(401))
async def end(request: AnyRequest, caller: NamedDependency[Caller]) -> Response[None]:
    """Delete the cookie."""
    return Response(None, headers=NO_STORE, cookies=[_cookie(request, "", 0)])


def _cookie(request: AnyRequest, value: str, seconds: int) -> Cookie:
    strict: Literal["strict"] = "strict"
    # uvicorn trusts X-Forwarded-Proto from this machine only, and puts it into the scheme.
    secure = request.scope["scheme"] == "https"
    return Cookie(key=COOKIE, value=value, path="/", max_age=seconds, httponly=True, samesite=strict, secure=secure)


ROUTES = (session, begin, end)
