"""Query parameters and headers: what Litestar hands over, and how their text is read."""

from collections.abc import Callable
from functools import partial

import pytest
from litestar import Litestar, get
from litestar.testing import TestClient

from services.gateway.api.parameters import (
    After,
    Cursor,
    Forget,
    Format,
    IfNoneMatch,
    LastEventId,
    Limit,
    StatusFilter,
    audio_format,
    known_event,
    page_size,
    status_filter,
    truth,
)
from services.gateway.errors import ApiError

_NO_SIZES = ("", "0", "101", "1000", "-1", "+5", " 5", "5.0", "1e1", "\u0665", "\u00b2")
_READERS: dict[str, Callable[[str], object]] = {
    "limit": page_size,
    "status": status_filter,
    "format": audio_format,
    "forget": partial(truth, "forget"),
    "after": partial(known_event, "after"),
}


@get("/", sync_to_thread=False)
def echo(
    limit: Limit = "20",
    cursor: Cursor = None,
    status: StatusFilter = None,
    forget: Forget = "false",
    format: Format = None,  # noqa: A002
    after: After = None,
    last_event_id: LastEventId = None,
    if_none_match: IfNoneMatch = None,
) -> dict[str, str | None]:
    return {
        "limit": limit,
        "cursor": cursor,
        "status": status,
        "forget": forget,
        "format": format,
        "after": after,
        "Last-Event-ID": last_event_id,
        "If-None-Match": if_none_match,
    }


def test_what_is_left_out_has_its_default() -> None:
    with TestClient(Litestar([echo])) as client:
        found = client.get("/").json()
    assert found == dict.fromkeys(found) | {"limit": "20", "forget": "false"}


def test_text_is_handed_over_as_it_was_sent() -> None:
    """Litestar would take `null` for nothing, `1` for true and `1e1` for ten."""
    sent = {"limit": "1e1", "cursor": "null", "status": "null", "forget": "1", "format": "NULL", "after": "007"}
    headers = {"Last-Event-ID": "null", "If-None-Match": '"a", W/"b"'}
    with TestClient(Litestar([echo])) as client:
        assert client.get("/", params=sent, headers=headers).json() == sent | headers


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("20", 20), ("100", 100), ("007", 7)])
def test_a_page_has_from_1_to_100_songs(text: str, size: int) -> None:
    assert page_size(text) == size


@pytest.mark.parametrize(
    ("name", "text", "detail"),
    [
        *(("limit", text, "from 1 to 100") for text in _NO_SIZES),
        *(("status", text, "one of queued, ") for text in ("", "null", "Queued", "x")),
        *(("format", text, "flac, wav, mp3, ogg") for text in ("", "null", "aac")),
        *(("forget", text, "true or false") for text in ("", "1", "True", "null")),
        *(("after", text, "the id of an event") for text in ("x", "-1", "9" * 19)),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_is_allowed(name: str, text: str, detail: str) -> None:
    with pytest.raises(ApiError) as found:
        _READERS[name](text)
    assert (found.value.status, found.value.kind, found.value.field) == (422, "invalid-request", name)
    assert detail in found.value.detail


def test_right_values_are_read() -> None:
    assert (status_filter(None), status_filter("queued")) == (None, "queued")
    assert (audio_format(None), audio_format("ogg")) == (None, "ogg")
    assert (truth("forget", "true"), truth("forget", "false")) == (True, False)
    assert [known_event("after", text) for text in (None, "", "0", "17")] == [None, None, 0, 17]
