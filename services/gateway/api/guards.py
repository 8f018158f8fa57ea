"""Checks before a request reaches its handler: the host name it was sent to, the page it came from, its key.

Routes are closed unless they are marked. Where the gateway has keys, a route without a mark needs one; where it has
none, such a route answers only under the service's own host names. Marks are Litestar's `opt` of a route.
"""

from collections.abc import Mapping
from typing import Any

from litestar.connection import ASGIConnection
from litestar.enums import ScopeType
from litestar.handlers import BaseRouteHandler
from litestar.types import Send

from services.gateway.auth.api_keys import Caller
from services.gateway.auth.authenticate import Authenticator, key_in_headers
from services.gateway.auth.origins import Address, Origin
from services.gateway.errors import MEDIA_TYPE, ApiError
from shared.settings import Settings

PUBLIC = {"public": True}  # needs no key: it says nothing about songs
PROBE = PUBLIC | {"any_host": True}  # kubelets and Prometheus ask under host names of their own
CHECKS_ITSELF = {"checks_itself": True}  # a websocket that answers a refused handshake itself, with the reason
OWN_PAGES = {"own_pages": True}  # a GET that pages of other origins may not send

Connection = ASGIConnection[Any, Any, Any, Any]
_HARMLESS = ("GET", "HEAD", "OPTIONS")


def need_key(connection: Connection, handler: BaseRouteHandler) -> None:
    """Require a key for every route without a mark, whether or not its handler uses the caller. A guard of Litestar."""
    if not (handler.opt.get("public") or handler.opt.get("checks_itself")):
        connection.app.state.authenticator.caller(connection)


def provide_caller(request: Connection) -> Caller:
    """Find the caller of a request: the dependency `caller` of HTTP handlers."""
    caller: Caller = request.app.state.authenticator.caller(request)
    return caller


def is_for_own_pages(method: str, marks: Mapping[str, Any]) -> bool:
    """Whether pages of other origins may not send this: everything that changes state, and what is marked."""
    return bool(method.upper() not in _HARMLESS or marks.get("own_pages"))


class PageRules:
    """Decides what web pages may do through the browser of a user who can reach the service.

    Without keys every client that reaches the service may do everything, and a browser lends that right to every page.
    """

    def __init__(self, settings: Settings, authenticator: Authenticator) -> None:
        self._authenticator = authenticator
        self._names = {settings.host.lower().removesuffix("."), *settings.allowed_hosts.split(",")} - {""}
        self._listed = {Origin.parse(origin) for origin in settings.cors_origins.split(",")} - {None}

    def guard(self, connection: Connection, handler: BaseRouteHandler) -> None:
        """Check every route. A websocket that it refuses gets uvicorn's 403 without a body. A guard of Litestar."""
        if not handler.opt.get("checks_itself"):
            self.check(connection, handler.opt)

    def check(self, connection: Connection, marks: Mapping[str, Any]) -> None:
        """Raise a 421 `ApiError` for a name that is not the service's, a 403 one for pages of other origins."""
        hosts = connection.headers.getall("host", [])
        host = ", ".join(hosts)
        if hosts and not (self._authenticator.keys_required or marks.get("any_host") or self._is_known(host)):
            raise _unknown_host()
        origin = connection.headers.get("origin")
        if origin is None or (found := Origin.parse(origin)) in self._listed or (found and found.is_at(host)):
            return
        if connection.scope["type"] == ScopeType.HTTP:
            if not is_for_own_pages(str(connection.scope.get("method")), marks):
                return
        elif self._authenticator.keys_required:
            return  # accepted and closed with 4401, as without a key: browsers cannot see why a handshake failed
        if not self._has_valid_header(connection):
            raise _foreign_origin()

    def _is_known(self, host: str) -> bool:
        address = Address.parse(host)
        return address is not None and (address.cannot_be_rebound or address.host in self._names)

    def _has_valid_header(self, connection: Connection) -> bool:
        """Whether a valid key is in the headers: a page can set it there only if it knows the key."""
        if not self._authenticator.keys_required or key_in_headers(connection) is None:
            return False
        try:
            self._authenticator.caller(connection)
        except ApiError:
            return False
        return True


async def refuse_handshake(error: ApiError, send: Send) -> None:
    """Answer the handshake of a websocket with a problem detail instead of accepting it."""
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"cache-control", b"no-store")]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
    body = error.response().content
    await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


def _unknown_host() -> ApiError:
    return ApiError(
        421,
        "unknown-host",
        "this service does not know itself by the name in the address: use localhost or an IP address, or add the name "
        "to HEARTMULA_ALLOWED_HOSTS",
    )


def _foreign_origin() -> ApiError:
    return ApiError(
        403,
        "foreign-origin",
        "a web page of another origin sent this: list its origin in HEARTMULA_CORS_ORIGINS, or send an API key in the "
        "Authorization header; if it is the service's own page, the proxy before it has to pass Host on unchanged",
    )
