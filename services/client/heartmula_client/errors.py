"""Errors that the client raises.

::

    ClientError
    ├── Unreachable         nothing answers, or the connection was lost repeatedly
    ├── UnexpectedAnswer    the answer does not come from this service
    ├── Refused             4xx: the request has to be changed or repeated later
    │   ├── UnknownSong     no song has this id
    │   └── UnknownRecording    no recording has this id
    ├── ServiceFault        5xx: the service, or a server that it needs, failed
    └── SongIncomplete      the song failed or was cancelled: a stream of it ended before its end
"""

import math
from typing import Any

import httpx
import msgspec

from heartmula_client.responses import Song


class ClientError(Exception):
    """Base of the client's errors. The message can be shown to a user.

    The attributes are the members of the answer's problem details (RFC 9457), where there are any; `kind` stands in
    for a missing title.
    """

    kind = "Something went wrong"

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        type: str = "about:blank",  # noqa: A002, the RFC's name
        title: str = "",
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """`status` is the HTTP status, `field` the invalid field of the request, `retry_after` in seconds."""
        super().__init__(detail)
        self.detail, self.status, self.type, self.title = detail, status, type, title
        self.field, self.retry_after = field, retry_after


class Unreachable(ClientError):
    """The service does not answer, or the connection was lost repeatedly."""

    kind = "The service cannot be reached"


class UnexpectedAnswer(ClientError):
    """The answer is not one that this service gives."""

    kind = "The answer is not this service's"


class Refused(ClientError):
    """The service refused the request."""


class UnknownSong(Refused):
    """No song has this id, or it has been deleted."""


class UnknownRecording(Refused):
    """No recording has this id, or it has been deleted."""


class ServiceFault(ClientError):
    """The service, or a server that it needs, failed."""


class SongIncomplete(ClientError):
    """The song failed or was cancelled, and what there was of its audio has been received."""

    kind = "The song is incomplete"

    def __init__(self, song: Song) -> None:
        """`song` is its final state."""
        super().__init__(how_it_ended(song))
        self.song = song


def how_it_ended(song: Song) -> str:
    """Say how a song ended that was not completed."""
    if song.status == "failed":
        return f"the song failed: {song.error or 'the log of the worker says why'}"
    return f"the song was {song.status}"


class _Problem(msgspec.Struct):
    """Problem details, from the service or from a proxy in front of it; any member may be missing."""

    type: str = "about:blank"
    title: str = ""
    detail: str = ""
    field: str | None = None


def error_from(answer: httpx.Response) -> ClientError:
    """Return the error for an answer with status 400 or above, whose body has been read."""
    try:
        details = msgspec.json.decode(answer.content, type=_Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        details = _Problem()
    details.title = details.title or answer.reason_phrase
    kind: type[ClientError] = Refused if answer.status_code < 500 else ServiceFault
    if details.type.endswith("/unknown-job"):
        kind = UnknownSong
    elif details.type.endswith("/unknown-recording"):
        kind = UnknownRecording
    return kind(
        details.detail or f"{answer.request.url.host} answered {answer.status_code} {details.title}",
        status=answer.status_code,
        type=details.type,
        title=details.title,
        field=details.field,
        retry_after=_seconds(answer.headers.get("retry-after")),
    )


def cause(error: httpx.TransportError) -> str:
    """Describe why a connection failed."""
    return "it takes too long" if isinstance(error, httpx.TimeoutException) else str(error) or "it ends without a word"


def _seconds(header: str | None) -> float | None:
    """Parse Retry-After in seconds. The service does not use the form with a date."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def as_json(error: ClientError) -> dict[str, Any]:
    """Return the error as problem details, for the output in JSON."""
    members = {
        "type": error.type,
        "title": error.title or error.kind,
        "status": error.status,
        "detail": error.detail,
        "field": error.field,
        "retry_after": error.retry_after,
    }
    return {name: value for name, value in members.items() if value is not None}
