"""Errors as RFC 9457 problem details: one table of kinds, one way from an exception to an answer."""

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException

from shared.errors import HeartMulaError, InvalidRequest, JobConflict, QueueFull, Unavailable

log = logging.getLogger(__name__)

UNKNOWN_SECONDS = 15  # what a client is told to wait where nothing is known
MEDIA_TYPE = "application/problem+json"

# The last part of `type`, which never changes, and its title.
TITLES = {
    "invalid-request": "The request has to be changed",
    "idempotency-mismatch": "The key belongs to another request",
    "malformed-json": "The body is not JSON",
    "unsupported-media-type": "The body's type is not supported",
    "too-large": "The body is too large",
    "queue-full": "The queue is full",
    "unauthorized": "A key is needed",
    "foreign-origin": "A web page of another origin asks",
    "unknown-host": "The service is not known by this name",
    "too-many-requests": "A limit of the key or the client is reached",
    "unavailable": "A server that is needed does not answer",
    "conflict": "The song's state does not allow this",
    "not-ready": "The song is not finished yet",
    "no-audio": "There is no audio",
    "unknown-job": "There is no such song",
    "not-found": "There is nothing at this address",
    "method-not-allowed": "This address does not take this method",
    "range-not-satisfiable": "The range lies outside the audio",
    "refused": "The request was refused",
    "internal": "Something went wrong in the gateway",
}
# The status that each comes with.
STATUSES = {
    "invalid-request": 422,
    "idempotency-mismatch": 422,
    "malformed-json": 400,
    "unsupported-media-type": 415,
    "too-large": 413,
    "queue-full": 429,
    "unauthorized": 401,
    "foreign-origin": 403,
    "unknown-host": 421,
    "too-many-requests": 429,
    "unavailable": 503,
    "conflict": 409,
    "not-ready": 409,
    "no-audio": 410,
    "unknown-job": 404,
    "not-found": 404,
    "method-not-allowed": 405,
    "range-not-satisfiable": 416,
    "refused": 400,  # or another 4xx
    "internal": 500,
}
_HTTP_KINDS = {404: "not-found", 405: "method-not-allowed", 413: "too-large", 415: "unsupported-media-type"}
_HTTP_DETAILS = {
    404: "check the address; the web page is at / and the API begins with /generate",
    413: "the body may have at most 256 KiB",
}


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An RFC 9457 problem detail, as it is documented."""

    type: str
    title: str
    status: int
    detail: str  # what to change
    field: str | None = None  # of the request, where one is at fault
    service: str | None = None  # "nats" or "s3", where one is away


class ApiError(HeartMulaError):
    """An answer other than the one that was asked for."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        field: str = "",
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        """`members` are added to the problem detail."""
        super().__init__(detail)
        self.status, self.kind, self.detail, self.field = status, kind, detail, field
        self.headers, self.members = dict(headers or {}), dict(members or {})

    def body(self) -> dict[str, Any]:
        """The problem detail."""
        found = {
            "type": f"/problems/{self.kind}",
            "title": TITLES[self.kind],
            "status": self.status,
            "detail": self.detail,
        }
        return found | ({"field": self.field} if self.field else {}) | self.members

    def response(self) -> Response[bytes]:
        """The HTTP answer."""
        return Response(
            msgspec.json.encode(self.body()),
            status_code=self.status,
            media_type=MEDIA_TYPE,
            headers={"Cache-Control": "no-store"} | self.headers,
        )


def unknown_job() -> ApiError:
    """Nobody knows the song, or no longer."""
    return ApiError(404, "unknown-job", "no song has this id; records are kept for a week")


def refusal(error: Exception, retry_seconds: int = UNKNOWN_SECONDS) -> ApiError:
    """What is answered to an exception, whatever it is. What was not foreseen is logged, and kept from the client.

    `retry_seconds` is what a client is told to wait when the queue is full or a server is away.
    """
    retry = {"Retry-After": str(retry_seconds)}
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(422, "invalid-request", str(error), field=error.field)
        case QueueFull():
            return ApiError(429, "queue-full", str(error), headers=retry)
        case Unavailable():
            return ApiError(503, "unavailable", str(error), headers=retry, members={"service": error.service})
        case JobConflict():
            return ApiError(409, "conflict", str(error))
        case HTTPException() if error.status_code < 500:
            return _http(error)
    log.error("unexpected %s", type(error).__name__, exc_info=error)
    return ApiError(500, "internal", "this is a fault of the gateway; its log says more")


def _http(error: HTTPException) -> ApiError:
    status = error.status_code
    kind = _HTTP_KINDS.get(status, "refused")
    detail = _HTTP_DETAILS.get(status) or error.detail or TITLES[kind]
    headers = {str(name).title(): str(value) for name, value in (error.headers or {}).items()}
    if isinstance(error, MethodNotAllowedException) and (allow := headers.get("Allow")):
        detail = f"this address takes {allow}"
    return ApiError(status, kind, detail, headers=headers)


def answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Litestar's exception handler for everything."""
    return refusal(error, request.app.state.outage.retry_after(error)).response()
