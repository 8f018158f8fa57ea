"""Authentication: which tenant a request comes from. Without a file of keys every caller is the tenant "local"."""

from typing import Any

from litestar.connection import ASGIConnection

from services.gateway.auth.api_keys import ApiKeys, Caller
from services.gateway.auth.origins import is_own
from services.gateway.errors import ApiError
from shared.nats.subjects import TENANT

COOKIE = "heartmula_key"
COOKIE_SECONDS = 30 * 86400
ELEVENLABS_HEADER = "xi-api-key"  # in which ElevenLabs' clients send their key

Connection = ASGIConnection[Any, Any, Any, Any]


class Authenticator:
    """Finds the caller of a request by its key."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    @property
    def keys_required(self) -> bool:
        """Whether a request needs a key."""
        return self._keys.required

    def caller(self, connection: Connection) -> Caller:
        """The caller, by a key in the headers or else in the cookie. Raises a 401 `ApiError`."""
        if not self.keys_required:
            return Caller(TENANT)
        if (key := key_in_headers(connection)) is not None:
            return self._caller_with(key)
        # Browsers send a cookie with requests that pages of others make; the header only a page of ours can set.
        # SameSite keeps other sites out, but not other ports of this host.
        if _is_from_elsewhere(connection):
            raise _unauthorized()
        return self._caller_with(connection.cookies.get(COOKIE, ""))

    def tenant(self, name: str) -> Caller:
        """The caller of a tenant whose right to its name the NATS server has checked. Raises a 401 `ApiError`."""
        if not self.keys_required and name == TENANT:
            return Caller(TENANT)
        caller = self._keys.caller_named(name)
        if caller is None:
            raise ApiError(401, "unauthorized", "there is no such tenant")
        return caller

    def _caller_with(self, key: str) -> Caller:
        if not key:
            raise _unauthorized()
        caller = self._keys.caller_with(key)
        if caller is None:
            raise _unauthorized("this API key is not known")
        return caller


def key_in_headers(connection: Connection) -> str | None:
    """The key that the headers give, empty where they give one in another way; None without such a header."""
    header = connection.headers.get("authorization")
    if header is None:
        return connection.headers.get(ELEVENLABS_HEADER)
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _is_from_elsewhere(connection: Connection) -> bool:
    """Whether a browser says that a page of another origin sent the request."""
    origin = connection.headers.get("origin")
    if origin is not None:
        return not is_own(origin, connection.headers.get("host", ""))
    return connection.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")


def _unauthorized(detail: str | None = None) -> ApiError:
    return ApiError(
        401,
        "unauthorized",
        detail or "an API key is needed: send Authorization: Bearer and the key",
        headers={"WWW-Authenticate": "Bearer"},
    )
