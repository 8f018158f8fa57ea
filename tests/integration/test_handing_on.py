"""The end of a song's tokens while the song waits for the codec already: whatever the codec does, it is decoded."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from services.tokenizer_worker.stage import _hand_on
from shared.errors import Unavailable
from shared.jobs.queues import queue_windows
from shared.jobs.store import JobStore, change
from shared.nats.streams import bootstrap, purge_job
from shared.nats.subjects import DEC, decode_subject
from shared.schema.decoding import read_order
from shared.schema.job import AudioPart, Decode, DecodeJob, Job
from shared.schema.listening import Listening
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from shared.worker.listeners import Listeners

EARLY, LATE = "tokens/song/1.safetensors", "tokens/song/7.safetensors"
PART = AudioPart(key="audio/song/5.0.part", size=9, samples=2)
SONG = Job(
    job_id="song",
    tenant="local",
    request=GenerateRequest(lyrics="la"),
    created_at=1.0,
    status="generating",
    fencing_token=7,
    attempts=2,
    failures=1,
    tokens_key=EARLY,
    saved_frames=400,
    decode=Decode(fencing_token=5, parts=(PART,)),
)


@pytest.fixture
async def js(nats_settings: Settings) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(nats_settings.nats_url)
    await bootstrap(client.jetstream(), nats_settings)
    await JobStore(client.jetstream()).create(SONG)
    yield client.jetstream()
    await client.close()


class Jobs(JobStore):
    """A job store with which something happens before and after a record is changed."""

    def __init__(self, js: JetStreamContext, before: Callable[[], Awaitable[Any]], after: Callable[[], Awaitable[Any]]):
        super().__init__(js)
        self.before, self.after = before, after

    async def update(self, job_id: str, tenant: str, decide: Callable[[Job], Job]) -> Job:
        await self.before()
        job = await super().update(job_id, tenant, decide)
        await self.after()
        return job


async def nothing() -> None:
    """Nothing happens."""


async def hand_on(
    js: JetStreamContext,
    *,
    before: Callable[[], Awaitable[Any]] = nothing,
    after: Callable[[], Awaitable[Any]] = nothing,
    listened: bool = False,
) -> None:
    """Hand the song on with 500 frames; `before` and `after` happen around the change of its record."""

    async def retry(call: Callable[[], Awaitable[Any]], *_: object) -> Any:
        return await call()

    listeners = Listeners(lambda: 0.0)
    if listened:
        listeners.add(Listening(job_id="song", gateway="g", listeners=1, buffered=9))
    context: Any = SimpleNamespace(job=SONG, turn=SimpleNamespace(fencing_token=7), publish=lambda _: None)
    saved: Any = SimpleNamespace(key=LATE, delete_older=nothing, name_in_record=nothing)
    worker: Any = SimpleNamespace(nc=js._nc, jobs=Jobs(js, before, after), retry=retry, listeners=listeners)
    await _hand_on(context, saved, 500, worker)


async def messages(js: JetStreamContext) -> dict[str, DecodeJob]:
    """The song's messages, by lane."""
    found = {}
    for lane in ("normal", "high"):
        subject = decode_subject("song", lane)
        with contextlib.suppress(NotFoundError):
            found[lane] = read_order(subject, (await js.get_msg(DEC, subject=subject)).data or b"", DecodeJob)
    return found


async def record(js: JetStreamContext) -> Job:
    job = await JobStore(js).get("song")
    assert job is not None
    return job


@pytest.mark.parametrize("listened", [False, True])
async def test_a_song_that_waits_nowhere_is_queued_whole(js: JetStreamContext, listened: bool) -> None:
    await hand_on(js, listened=listened)
    ((lane, order),) = (await messages(js)).items()
    assert lane == ("high" if listened else "normal")
    assert (order.last, order.frames, order.tokens_key) == (True, 500, LATE)
    job = await record(js)
    assert (job.status, job.frames, job.tokens_key, job.saved_frames) == ("decoding", 500, LATE, None)
    assert (job.fencing_token, job.attempts, job.failures) == (None, 0, 0)
    assert job.decode == SONG.decode


async def test_a_song_that_waits_already_keeps_its_message(js: JetStreamContext) -> None:
    await queue_windows(js._nc, SONG)
    await hand_on(js)
    (order,) = (await messages(js)).values()
    assert not order.last, "the record tells the codec that all tokens are there"
    assert (await record(js)).status == "decoding"


async def test_a_song_that_a_codec_acknowledges_meanwhile_is_queued_again(js: JetStreamContext) -> None:
    """It read the record before that said that all tokens are there."""
    await queue_windows(js._nc, SONG)
    await hand_on(js, after=lambda: purge_job(js, "song"))
    (order,) = (await messages(js)).values()
    assert (order.last, order.frames, order.tokens_key) == (True, 500, LATE)


async def test_a_listener_who_came_meanwhile_puts_the_song_into_the_lane_that_goes_first(js: JetStreamContext) -> None:
    await queue_windows(js._nc, SONG)
    await hand_on(js, listened=True)
    assert {lane: order.last for lane, order in (await messages(js)).items()} == {"normal": False, "high": True}


async def test_a_record_that_the_codec_moved_on_names_the_tokens_of_this_turn(js: JetStreamContext) -> None:
    def moved(job: Job) -> Job:
        return change(job, status="decoding", fencing_token=None, tokens_key=EARLY, frames=500)

    await hand_on(js, before=lambda: JobStore(js).update("song", "local", moved))
    job = await record(js)
    assert (job.status, job.tokens_key, job.frames, job.saved_frames) == ("decoding", LATE, 500, None)
    assert job.decode == SONG.decode


async def test_a_song_that_the_codec_completed_meanwhile_is_not_queued_again(js: JetStreamContext) -> None:
    def completed(job: Job) -> Job:
        return change(change(job, status="decoding"), status="completed", audio_key="audio/song/5.flac")

    async def complete() -> None:
        await JobStore(js).update("song", "local", completed)
        await purge_job(js, "song")

    await queue_windows(js._nc, SONG)
    await hand_on(js, before=complete)
    assert await messages(js) == {}
    job = await record(js)
    assert (job.status, job.audio_key, job.decode) == ("completed", "audio/song/5.flac", None)


async def test_a_full_queue_ends_the_turn_and_the_song_is_handed_on_later(
    js: JetStreamContext, nats_settings: Settings
) -> None:
    info = await js.stream_info(DEC)
    info.config.max_msgs = 1
    await js.update_stream(info.config)
    await js.publish("jobs.dec.other", b"{}")
    with pytest.raises(Unavailable, match="too many songs wait to be decoded"):
        await hand_on(js)
    assert (await record(js)).status == "generating"
