"""Errors as RFC 9457 problem details: one table of all types, and one way from any exception to a response."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException

from shared.errors import (
    HeartMulaError,
    InvalidRequest,
    JobConflict,
    QueueFull,
    RecordingRefused,
    RefusalReason,
    Unavailable,
)

log = logging.getLogger(__name__)

UNKNOWN_SECONDS = 15  # Retry-After where nothing better is known
MEDIA_TYPE = "application/problem+json"


class ProblemType(NamedTuple):
    """A kind of problem: the status that it comes with, and its title."""

    status: int
    title: str


# By the last part of their `type`, which never changes.
PROBLEMS = {
    "invalid-request": ProblemType(422, "The request has to be changed"),
    "idempotency-mismatch": ProblemType(422, "The key belongs to another request"),
    "malformed-json": ProblemType(400, "The body is not JSON"),
    "unsupported-media-type": ProblemType(415, "The body's type is not supported"),
    "too-large": ProblemType(413, "The body is too large"),
    "queue-full": ProblemType(429, "The queue is full"),
    "unauthorized": ProblemType(401, "A key is needed"),
    "foreign-origin": ProblemType(403, "A web page of another origin asks"),
    "unknown-host": ProblemType(421, "The service is not known by this name"),
    "too-many-requests": ProblemType(429, "A limit of the key or the client is reached"),
    "unavailable": ProblemType(503, "A server that is needed does not answer"),
    "conflict": ProblemType(409, "The song's state does not allow this"),
    "not-ready": ProblemType(409, "The song is not finished yet"),
    "no-audio": ProblemType(410, "There is no audio"),
    "no-tokens": ProblemType(410, "The song's tokens are no longer kept"),
    "malformed-form": ProblemType(400, "The form is broken, or is not one with a file"),
    "unknown-audio-format": ProblemType(415, "The file is neither FLAC nor WAV, MP3 or Ogg"),
    "unsupported-audio": ProblemType(415, "The file is audio of a kind that is not taken"),
    "audio-too-long": ProblemType(413, "The recording is too long"),
    "audio-too-costly": ProblemType(413, "The recording takes too much to decode"),
    "audio-too-short": ProblemType(422, "The recording is too short"),
    "damaged-audio": ProblemType(422, "The file is damaged"),
    "too-slow": ProblemType(408, "The body comes too slowly"),
    "no-encoder": ProblemType(501, "This installation takes no recordings"),
    "unknown-recording": ProblemType(404, "There is no such recording"),
    "unknown-job": ProblemType(404, "There is no such song"),
    "not-found": ProblemType(404, "There is nothing at this address"),
    "method-not-allowed": ProblemType(405, "This address does not take this method"),
    "range-not-satisfiable": ProblemType(416, "The range lies outside the audio"),
    "refused": ProblemType(400, "The request was refused"),  # or another 4xx
    "internal": ProblemType(500, "Something went wrong in the gateway"),
}
REFUSALS: dict[RefusalReason, str] = {  # of recordings
    "too-large": "too-large",
    "too-slow": "too-slow",
    "malformed": "malformed-form",
    "unknown-format": "unknown-audio-format",
    "unsupported": "unsupported-audio",
    "empty": "audio-too-short",
    "too-short": "audio-too-short",
    "damaged": "damaged-audio",
    "too-long": "audio-too-long",
    "too-costly": "audio-too-costly",
}
_HTTP_KINDS = {404: "not-found", 405: "method-not-allowed", 413: "too-large", 415: "unsupported-media-type"}
_HTTP_DETAILS = {
    404: "check the address; the web page is at /, and /docs lists the routes of the API",
    413: "the body may have at most 256 KiB",
}


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of an error: a problem detail of RFC 9457."""

    type: str
    title: str
    status: int
    detail: str  # what to change
    field: str | None = None  # of the request, where one is at fault
    service: str | None = None  # "nats" or "s3", where one does not answer; "disk" or "decoder" for recordings


class ApiError(HeartMulaError):
    """An error that is answered with a problem detail; NATS clients get it in JetStream's form."""

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
        """`kind` is a key of `PROBLEMS`; `members` are added to the problem detail."""
        super().__init__(detail)
        self.status, self.kind, self.detail, self.field = status, kind, detail, field
        self.headers, self.members = dict(headers or {}), dict(members or {})

    def body(self) -> dict[str, Any]:
        """The problem detail."""
        found = {
            "type": f"/problems/{self.kind}",
            "title": PROBLEMS[self.kind].title,
            "status": self.status,
            "detail": self.detail,
        }
        return found | ({"field": self.field} if self.field else {}) | self.members

    def response(self) -> Response[bytes]:
        """The problem detail as an HTTP response."""
        return Response(
            msgspec.json.encode(self.body()),
            status_code=self.status,
            media_type=MEDIA_TYPE,
            headers={"Cache-Control": "no-store"} | self.headers,
        )


def unknown_job() -> ApiError:
    """Build the 404 error for a song that does not exist, or no longer."""
    return ApiError(404, "unknown-job", "no song has this id; records are kept for a week")


def unknown_recording() -> ApiError:
    """Build the 404 error for a recording that does not exist, or no longer."""
    return ApiError(404, "unknown-recording", "no recording has this id; records are kept for a week")


def to_api_error(error: Exception, retry_seconds: int = UNKNOWN_SECONDS) -> ApiError:
    """Map any exception to the error that is answered. An unforeseen one is logged, and hidden from the client.

    `retry_seconds` becomes Retry-After where the queue is full or a server does not answer.
    """
    retry = {"Retry-After": str(retry_seconds)}
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(422, "invalid-request", str(error), field=error.field)
        case RecordingRefused():
            kind = REFUSALS[error.reason]
            return ApiError(PROBLEMS[kind].status, kind, str(error))
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
    detail = _HTTP_DETAILS.get(status) or error.detail or PROBLEMS[kind].title
    headers = {str(name).title(): str(value) for name, value in (error.headers or {}).items()}
    if isinstance(error, MethodNotAllowedException) and (allow := headers.get("Allow")):
        detail = f"this address takes {allow}"
    return ApiError(status, kind, detail, headers=headers)


def answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Answer an exception that a handler raised: Litestar's exception handler for all of them."""
    return to_api_error(error, request.app.state.outage.retry_after(error)).response()
