"""Query parameters and headers of the routes: how they are documented, and how their text is read.

Litestar hands all of them over as text. Its own conversion takes `1` for true, `1e1` for a whole number and `null` for
a parameter that was left out. Here a wrong value is a 422 problem that names the parameter and says what is allowed.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_args

from litestar.params import HeaderParameter, QueryParameter

from services.gateway.errors import ApiError
from services.gateway.recordings.status import RECORD_STATUS, RecordingStatus
from services.gateway.songs.event_feed import event_id
from services.gateway.submission.validation import check_text
from shared.schema.base import JOB_ID
from shared.schema.job import Status
from shared.schema.request import AudioFormat

MAX_PAGE = 100  # songs or recordings
MAX_TITLE = 300  # characters, as of a song
_STATUSES: tuple[Status, ...] = get_args(Status)
_RECORDING_STATUSES: tuple[RecordingStatus, ...] = tuple(RECORD_STATUS)
_FORMATS: tuple[AudioFormat, ...] = get_args(AudioFormat)
_SECONDS = re.compile(r"[0-9]{1,5}(\.[0-9]{1,3})?")
_Choice = TypeVar("_Choice", bound=str)


def _schema(kind: str, **more: Any) -> dict[str, Any]:
    """The documented type, in place of the one that Litestar derives from the annotation."""
    return {"type": kind, "one_of": None, **more}


def _query(description: str, kind: str = "string", **schema: Any) -> QueryParameter:
    return QueryParameter(description=description, schema_extra=_schema(kind, **schema))


def _header(name: str, description: str, **schema: Any) -> HeaderParameter:
    return HeaderParameter(name=name, description=description, schema_extra=_schema("string", **schema))


_ID = {"pattern": "^[0-9A-Za-z-]{1,64}$"}
_EVENT_ID = {"pattern": "^[0-9]{0,18}$"}

# The page of a list.
Limit = Annotated[str, _query("entries on a page, at most", "integer", minimum=1, maximum=MAX_PAGE, default=20)]
Cursor = Annotated[str | None, _query("`next` of the page before")]
StatusFilter = Annotated[str | None, _query("only songs in this state", enum=list(_STATUSES))]
ParentFilter = Annotated[str | None, _query("only songs that go on from this one", **_ID)]
RecordingStatusFilter = Annotated[str | None, _query("only recordings in this state", enum=list(_RECORDING_STATUSES))]
# A recording.
Title = Annotated[str | None, _query("of the recording", maxLength=MAX_TITLE)]
# What DELETE does to a song.
Forget = Annotated[str, _query("remove an ended song instead", "boolean", default=False)]
# The audio of a song.
Format = Annotated[str | None, _query("another format than the song was made in", enum=list(_FORMATS))]
StreamFormat = Annotated[str, _query("the format to hear it in", enum=list(_FORMATS), default="flac")]
From = Annotated[
    str,
    QueryParameter(
        name="from",
        description="the second to begin at; it begins at most 4,095 samples earlier",
        schema_extra=_schema("number", minimum=0, default=0),
    ),
]
Range = Annotated[str | None, _header("Range", "one range of bytes: `bytes=0-1023`, `bytes=1024-`, `bytes=-1024`")]
IfRange = Annotated[str | None, _header("If-Range", "the ETag of the audio that the range belongs to")]
IfNoneMatch = Annotated[str | None, _header("If-None-Match", "the ETag of an earlier answer: 304 where it still holds")]
# The events of a song.
After = Annotated[str | None, _query("id of the latest event that is known: later ones are sent first", **_EVENT_ID)]
LastEventId = Annotated[
    str | None, _header("Last-Event-ID", "as `after`: browsers send it when they connect again", **_EVENT_ID)
]
# A request for a song.
IdempotencyKey = Annotated[
    str | None,
    _header(
        "Idempotency-Key",
        "of your own choice: the same request under the same key is answered with the same song",
        min_length=1,
        max_length=255,
        pattern="^[!-~]+$",
    ),
]


def page_size(text: str) -> int:
    """Read `limit`. Raises a 422 `ApiError`."""
    size = int(text) if text.isascii() and text.isdigit() and len(text) <= 3 else 0
    if not 1 <= size <= MAX_PAGE:
        raise _wrong("limit", f"limit has to be from 1 to {MAX_PAGE}")
    return size


def status_filter(text: str | None) -> Status | None:
    """Read `status`. Raises a 422 `ApiError`."""
    return None if text is None else _choice("status", text, _STATUSES)


def recording_status_filter(text: str | None) -> RecordingStatus | None:
    """Read `status` of recordings. Raises a 422 `ApiError`."""
    return None if text is None else _choice("status", text, _RECORDING_STATUSES)


def title_of(text: str | None) -> str | None:
    """Read `title`; a blank one is none. Raises a 422 `ApiError` or `InvalidRequest`."""
    if text is None or not text.strip():
        return None
    if len(text) > MAX_TITLE:
        raise _wrong("title", f"title may have at most {MAX_TITLE} characters")
    check_text("title", text, "")
    return text


def parent_filter(text: str | None) -> str | None:
    """Read `parent`. Raises a 422 `ApiError`."""
    if text is not None and not JOB_ID.fullmatch(text):
        raise _wrong("parent", "parent has to be the id of a song or recording")
    return text


def audio_format(text: str | None) -> AudioFormat | None:
    """Read `format`. Raises a 422 `ApiError`."""
    return None if text is None else _choice("format", text, _FORMATS)


def stream_format(text: str) -> AudioFormat:
    """Read `format` of a stream. Raises a 422 `ApiError`."""
    return _choice("format", text, _FORMATS)


def start_second(text: str) -> float:
    """Read `from`. Raises a 422 `ApiError`."""
    if not _SECONDS.fullmatch(text):
        raise _wrong("from", "from has to be a number of seconds, as 90 or 12.5")
    return float(text)


def truth(name: str, text: str) -> bool:
    """Read a parameter that is true or false. Raises a 422 `ApiError`."""
    if text not in ("true", "false"):
        raise _wrong(name, f"{name} has to be true or false")
    return text == "true"


def known_event(name: str, text: str | None) -> int | None:
    """Read the id of an event that the client knows; an empty one is none. Raises a 422 `ApiError`."""
    if not text:
        return None
    try:
        return event_id(text)
    except ValueError:
        raise _wrong(name, f"{name} must be the id of an event") from None


def _choice(name: str, text: str, choices: Sequence[_Choice]) -> _Choice:
    for choice in choices:
        if choice == text:
            return choice
    raise _wrong(name, f"{name} has to be one of {', '.join(choices)}")


def _wrong(field: str, detail: str) -> ApiError:
    return ApiError(422, "invalid-request", detail, field=field)
