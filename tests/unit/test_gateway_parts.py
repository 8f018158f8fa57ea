"""Parts of the gateway that need no servers."""

import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest

from services.gateway.api.audio_response import disposition
from services.gateway.api.conditional import ByteRange, NotSatisfiable, parse_range, tag_matches
from services.gateway.api.nats_bodies import ErrorBody
from services.gateway.api.static_files import accepts_gzip
from services.gateway.errors import to_api_error
from services.gateway.events.broadcaster import SUBSCRIPTION_EVENTS, Subscription
from services.gateway.events.stored_events import StoredEvent
from shared.errors import QueueFull
from shared.schema.event import AnyEvent, Audio, Failed, Progress, Stage, cloud_event
from shared.schema.job import Job
from shared.schema.request import GenerateRequest


def stored(sequence: int, event: AnyEvent) -> StoredEvent:
    return StoredEvent(sequence, cloud_event(event, str(sequence)))


def progress(sequence: int) -> StoredEvent:
    return stored(sequence, Progress(job_id="j", status="generating", progress=1, done=1, total=2))


def stage(sequence: int) -> StoredEvent:
    return stored(sequence, Stage(job_id="j", status="generating", progress=0, stage="generating"))


def audio(sequence: int) -> StoredEvent:
    return stored(sequence, Audio(job_id="j", status="generating", progress=0, playable_seconds=25.6))


def test_torch_is_not_imported() -> None:
    code = "import sys, services.gateway.app, services.gateway.server; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_a_slow_listener_loses_old_progress_and_nothing_else() -> None:
    subscription = Subscription()
    subscription.put(stage(1))
    for sequence in range(2, SUBSCRIPTION_EVENTS * 3):
        subscription.put(progress(sequence))
    subscription.put(stored(1000, Failed(job_id="j", status="failed", progress=1, error="x")))
    found = [await subscription.get() for _ in range(len(subscription))]
    sequences = [item.sequence for item in found if item]
    assert sequences[0] == 1
    assert sequences[-1] == 1000
    assert sequences == sorted(sequences)
    assert sequences[-2] == SUBSCRIPTION_EVENTS * 3 - 1


@pytest.mark.parametrize(("last", "kept"), [(progress, [1, 20, 1000]), (stage, [1, 20, 1000]), (audio, [1, 1000])])
async def test_a_slow_listener_keeps_the_latest_word_of_what_can_be_heard(
    last: Callable[[int], StoredEvent], kept: list[int]
) -> None:
    subscription = Subscription()
    subscription.put(stage(1))
    for sequence in range(2, SUBSCRIPTION_EVENTS + 1):
        subscription.put(audio(sequence) if sequence in (10, 20) else progress(sequence))
    subscription.put(last(1000))
    assert [item.sequence for item in [await subscription.get() for _ in range(len(subscription))] if item] == kept


async def test_a_listener_that_would_lose_a_state_has_to_begin_anew() -> None:
    subscription = Subscription()
    for sequence in range(SUBSCRIPTION_EVENTS + 1):
        subscription.put(stage(sequence))
    assert subscription.lost
    assert await subscription.get() is None


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("bytes=0-0", ByteRange(0, 0)),
        ("bytes=5-", ByteRange(5, 9)),
        ("bytes=-3", ByteRange(7, 9)),
        ("bytes=-300", ByteRange(0, 9)),
        ("bytes=0-1,3-4", None),
        ("bytes=4-3", None),
        ("bytes=-", None),
        ("", None),
        ("bytes=" + "0" * 5000 + "-", None),
    ],
)
def test_ranges_are_read_as_http_says(header: str, found: ByteRange | None) -> None:
    assert parse_range(header, 10) == found


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0), ("bytes=-1", 0)])
def test_ranges_outside_of_a_file_are_refused(header: str, size: int) -> None:
    with pytest.raises(NotSatisfiable):
        parse_range(header, size)


def test_tags_are_split_and_tidied() -> None:
    assert tag_matches('W/"b", "a"', '"a"')
    assert tag_matches(" * ", '"a"')
    assert not tag_matches('"ab"', '"a"')
    assert not tag_matches("", '"a"')


@pytest.mark.parametrize(
    ("title", "name"),
    [
        (None, "j.flac"),
        ("../../etc/passwd", "etc passwd.flac"),
        ("...", "j.flac"),
        ("歌", "j.flac"),
        ('a"b\\c', "a b c.flac"),
        ("100%41", "100_41.flac"),
    ],
)
def test_file_names_are_safe(title: str | None, name: str) -> None:
    job = Job(job_id="j", tenant="local", request=GenerateRequest(lyrics="la", title=title), created_at=0)
    header = disposition(job, job.request.format)
    assert f'inline; filename="{name}"; ' in header
    header.encode("ascii")


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("", False),
        ("identity", False),
        ("br", False),
        ("gzip", True),
        ("gzip, deflate, br", True),
        ("br;q=1.0, GZIP ; q=0.5", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000, *", False),
        ("*", True),
        ("*;q=0", False),
        ("x-gzip", False),
        ("gzip;q=nonsense", False),
    ],
)
def test_what_an_accept_encoding_header_allows(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) == accepted


def test_unexpected_errors_reveal_nothing() -> None:
    assert "secret" not in str(to_api_error(RuntimeError("secret")).body())


def test_errors_for_nats_clients_have_the_members_that_their_libraries_know() -> None:
    body = msgspec.to_builtins(ErrorBody.of(to_api_error(QueueFull("full"))))
    assert body == {"code": 429, "err_code": 10077, "description": "full"}
