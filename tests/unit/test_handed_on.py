"""The songs that wait for the codec: for which of them a listener runs dry, by their records."""

from typing import Any

import msgspec
import pytest

from shared.errors import Unavailable
from shared.model.codec_windows import CodecWindows, can_be_decoded
from shared.schema.job import AudioPart, Decode, Job
from shared.schema.listening import Listening
from shared.schema.request import GenerateRequest
from shared.worker import handed_on as module
from shared.worker.handed_on import HandedOn
from shared.worker.listeners import Listeners

PART = AudioPart(key="audio/song/1.0.part", size=9, samples=2)


def waits_for_the_codec(job: Job) -> bool:
    return can_be_decoded(job, CodecWindows(50, 40))


def song(job_id: str = "song", **changes: Any) -> Job:
    job = Job(job_id=job_id, tenant="alice", request=GenerateRequest(lyrics="la"), created_at=1.0, status="generating")
    return msgspec.structs.replace(job, **changes)


class Jobs:
    """Replacement of the job store: records that a test sets, and how often they were read."""

    def __init__(self, *jobs: Job) -> None:
        self.records: dict[str, Job | Exception | None] = {job.job_id: job for job in jobs}
        self.reads = 0

    async def get(self, job_id: str, tenant: str) -> Job | None:
        assert tenant == "alice"
        self.reads += 1
        found = self.records[job_id]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def listeners() -> Listeners:
    return Listeners(lambda: 0.0)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> HandedOn:
    monkeypatch.setattr(module, "_READ_SECONDS", 0.0)
    return HandedOn(waits_for_the_codec)


def listen(listeners: Listeners, job_id: str, buffered: float) -> None:
    listeners.add(Listening(job_id=job_id, gateway="g", listeners=1, buffered=buffered))


async def dry_in(known: HandedOn, listeners: Listeners, jobs: Jobs, within: float = 10.0) -> float | None:
    return await known.dry_in(listeners, jobs, within)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("job", "waits"),
    [
        (song(), False),
        (song(saved_frames=49), False),
        (song(saved_frames=50), True),
        (song(saved_frames=89, decode=Decode(parts=(PART,))), False),
        (song(saved_frames=90, decode=Decode(parts=(PART,))), True),
        (song(saved_frames=90, decode=Decode(parts=(PART,) * 3)), False),
        (song(status="queued", decode=Decode(parts=(PART,))), False),
        (song(status="decoding", frames=30), True),
        (song(status="completed"), False),
        (song(status="cancelled"), False),
        (None, False),
    ],
)
async def test_a_song_waits_while_the_codec_can_go_on_with_it(
    job: Job | None, waits: bool, known: HandedOn, listeners: Listeners
) -> None:
    known.add(song())
    listen(listeners, "song", 4)
    jobs = Jobs()
    jobs.records["song"] = job
    assert await dry_in(known, listeners, jobs) == (4 if waits else None)


async def test_records_are_read_for_listeners_who_run_dry_soon_alone(known: HandedOn, listeners: Listeners) -> None:
    jobs = Jobs(song(saved_frames=50))
    known.add(song())
    assert await dry_in(known, listeners, jobs) is None
    listen(listeners, "song", 10.5)
    assert await dry_in(known, listeners, jobs) is None
    listen(listeners, "another worker's song", 0)
    assert await dry_in(known, listeners, jobs) is None
    assert jobs.reads == 0
    listen(listeners, "song", 10)
    assert await dry_in(known, listeners, jobs) == 10


async def test_the_driest_listener_counts_whose_song_waits(known: HandedOn, listeners: Listeners) -> None:
    jobs = Jobs(song("a", saved_frames=50), song("b", status="decoding"), song("c", saved_frames=10))
    for job_id, buffered in (("a", 7), ("b", 3), ("c", 1)):
        known.add(song(job_id))
        listen(listeners, job_id, buffered)
    assert await dry_in(known, listeners, jobs) == 3


async def test_what_was_read_is_believed_for_a_moment_and_until_more_is_handed_on(
    listeners: Listeners,
) -> None:
    known, jobs = HandedOn(waits_for_the_codec), Jobs(song())
    known.add(song())
    listen(listeners, "song", 0)
    assert [await dry_in(known, listeners, jobs) for _ in range(5)] == [None] * 5
    assert jobs.reads == 1
    jobs.records["song"] = song(saved_frames=50)
    known.add(song())
    assert await dry_in(known, listeners, jobs) == 0


async def test_records_that_cannot_be_read_end_no_turn(known: HandedOn, listeners: Listeners) -> None:
    jobs = Jobs(song("b", status="decoding"))
    jobs.records["a"] = Unavailable("nats", "away")
    for job_id, buffered in (("a", 0), ("b", 2)):
        known.add(song(job_id))
        listen(listeners, job_id, buffered)
    assert await dry_in(known, listeners, jobs) == 2


async def test_songs_of_long_ago_are_forgotten(known: HandedOn, listeners: Listeners) -> None:
    for number in range(1001):
        known.add(song(f"song {number}"))
    jobs = Jobs(song("song 0", status="decoding"), song("song 1", status="decoding"))
    listen(listeners, "song 0", 0)
    assert await dry_in(known, listeners, jobs) is None
    listen(listeners, "song 1", 0)
    assert await dry_in(known, listeners, jobs) == 0
