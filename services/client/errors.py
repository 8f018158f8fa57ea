"""Everything that the client raises.

::

    ClientError
    ├── Unreachable         nobody answers, or the connection was lost again and again
    ├── UnexpectedAnswer    something answers that is not this service
    ├── Refused             4xx: the request has to be changed, or comes at the wrong time
    │   └── UnknownSong     … because no song has this id
    └── ServiceFault        5xx: the service cannot do it now
"""

import math
from typing import Any

import httpx
import msgspec


class ClientError(Exception):
    """Base of everything raised here. Its message is fit to be shown to a user.

    The fields are those of the answer's problem detail (RFC 9457), where there is one; `kind` stands for its title
    where there is none.
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
        """`status` is that of HTTP; `field` the request's field at fault; `retry_after` in seconds."""
        super().__init__(detail)
        self.detail, self.status, self.type, self.title = detail, status, type, title
        self.field, self.retry_after = field, retry_after


class Unreachable(ClientError):
    """Nobody answers."""

    kind = "The service cannot be reached"


class UnexpectedAnswer(ClientError):
    """An answer that this service does not give."""

    kind = "The answer is not this service's"


class Refused(ClientError):
    """The service refused the request."""


class UnknownSong(Refused):
    """No song has this id, or no longer."""


class ServiceFault(ClientError):
    """The service, or a server that it needs, failed."""


class _Problem(msgspec.Struct):
    """A problem detail as it may come: from the service, or from a proxy in front of it."""

    type: str = "about:blank"
    title: str = ""
    detail: str = ""
    field: str | None = None


def problem(answer: httpx.Response) -> ClientError:
    """The error that an answer of 400 or more tells of. Its body must have been read."""
    try:
        said = msgspec.json.decode(answer.content, type=_Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = _Problem()
    said.title = said.title or answer.reason_phrase
    kind: type[ClientError] = Refused if answer.status_code < 500 else ServiceFault
    if said.type.endswith("/unknown-job"):
        kind = UnknownSong
    return kind(
        said.detail or f"{answer.request.url.host} answered {answer.status_code} {said.title}",
        status=answer.status_code,
        type=said.type,
        title=said.title,
        field=said.field,
        retry_after=_seconds(answer.headers.get("retry-after")),
    )


def cause(error: httpx.TransportError) -> str:
    """What a connection's failure means."""
    return "it takes too long" if isinstance(error, httpx.TimeoutException) else str(error) or "it ends without a word"


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds. Its other form, a date, is not used by the service."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def as_json(error: ClientError) -> dict[str, Any]:
    """The error for a program to read."""
    told = {
        "type": error.type,
        "title": error.title or error.kind,
        "status": error.status,
        "detail": error.detail,
        "field": error.field,
        "retry_after": error.retry_after,
    }
    return {name: value for name, value in told.items() if value is not None}
