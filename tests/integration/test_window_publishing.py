"""Songs whose tokens are still being made: when they get into the queue for audio, and what is written for it."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from nats.js.errors import NotFoundError

from shared.aio import end
from shared.device.lease import Lease
from shared.jobs.claims import with_claim
from shared.jobs.queues import queue_decode, queue_tokens, queue_windows
from shared.jobs.store import change
from shared.model.codec_windows import CodecWindows
from shared.nats.subjects import DEC, TENANT, TOK, decode_subject, listen_subject
from shared.schema.event import Progress
from shared.schema.job import AudioPart, DecodeJob, Job
from shared.schema.listening import Listening
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from shared.storage.keys import part_key, tokens_key
from shared.storage.token_file import TokenMeta, pack, unpack
from tests.integration.flow import PATIENCE, Flow, as_role, open_flow
from tests.integration.test_turns import stages, trivial_codes

CARD, WINDOWS = "card", CodecWindows(50, 40)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Settings with short windows, with which the models take turns."""
    return replace(
        settings,
        sequential_offload=True,
        gpu_id=CARD,
        batch=4,
        trivial_step_ms=15,
        trivial_window=(50, 40),
        checkpoint_seconds=3600,
    )


async def message(flow: Flow, job_id: str, *, live: bool = False) -> DecodeJob | None:
    """A song's message in a lane of the queue for audio."""
    with contextlib.suppress(NotFoundError):
        found = await flow.js.get_msg(DEC, subject=decode_subject(job_id, "high" if live else "normal"))
        return msgspec.json.decode(found.data or b"", type=DecodeJob)
    return None


async def until_queued(flow: Flow, job_id: str, *, live: bool = False, frames: int = 0) -> DecodeJob:
    """Wait for a song's message, of at least so many frames."""
    async with asyncio.timeout(PATIENCE):
        while (found := await message(flow, job_id, live=live)) is None or found.frames < frames:
            await asyncio.sleep(0.02)
        return found


async def remove(flow: Flow, job_id: str, *, live: bool = False) -> None:
    """Remove a song's message."""
    found = await flow.js.get_msg(DEC, subject=decode_subject(job_id, "high" if live else "normal"))
    assert found.seq is not None
    await flow.js.delete_msg(DEC, found.seq)


async def take(flow: Flow, job_id: str, *, live: bool = False) -> None:
    """Remove a song's message as a codec does that has decoded what it found; more may be there by now."""
    await remove(flow, job_id, live=live)
    job = await flow.until(job_id, lambda _: True)
    parts = len(job.decode.parts) if job.decode else 0
    if job.status == "decoding" or WINDOWS.final(job.saved_frames or 0) > parts:
        await queue_windows(flow.js._nc, job, listened=live)


async def decoded(flow: Flow, job_id: str, windows: int) -> None:
    """Write into the record that so many windows are decoded, as a codec does."""
    parts = tuple(AudioPart(key=part_key(job_id, 5, n), size=100, samples=1000) for n in range(windows))
    claim = {"fencing_token": 5, "parts": parts, "sample_rate": 8000}
    await flow.jobs.update(job_id, TENANT, lambda job: with_claim(job, "codec", claim=claim))


@asynccontextmanager
async def listening(flow: Flow, job_id: str, buffered: dict[str, float]) -> AsyncIterator[None]:
    """Somebody listens through each of some gateways, and has so many seconds left whenever the gateway says so."""

    async def report() -> None:
        while True:
            for gateway, left in buffered.items():
                said = Listening(job_id=job_id, gateway=gateway, listeners=1, buffered=left)
                await flow.js._nc.publish(listen_subject(job_id), msgspec.json.encode(said))
            await asyncio.sleep(0.3)

    reporting = asyncio.create_task(report())
    try:
        yield
    finally:
        await end(reporting)


async def frames_made(flow: Flow, job_id: str, least: int) -> None:
    """Wait until a song has so many frames, by its events."""
    async with asyncio.timeout(PATIENCE):
        while True:
            made = [event.data.done for event in await flow.events(job_id) if isinstance(event.data, Progress)]
            if made and made[-1] >= least:
                return
            await asyncio.sleep(0.05)


async def saved(flow: Flow, job: Job) -> tuple[np.ndarray, TokenMeta]:
    """The tokens that a record names."""
    return unpack(await flow.store.get(str(job.tokens_key)), job.job_id)


async def put_song(flow: Flow, frames: int, *, made: int = 0, ended: bool = False, **changes: object) -> str:
    """Put a song into the queue for tokens as a worker that died left it, with tokens of `made` frames stored."""
    job = Job(
        job_id=str(uuid.uuid4()),
        tenant=TENANT,
        request=GenerateRequest(lyrics="la", max_duration_ms=frames * 80, seed=7),
        created_at=time.time(),
        status="generating",
        fencing_token=1,
        attempts=1,
    )
    if made:
        key = tokens_key(job.job_id, 1)
        meta = TokenMeta(job_id=job.job_id, model="trivial", seed=7, ended=ended)
        await flow.store.put(key, pack(trivial_codes(job)[:, :made], meta))
        job = msgspec.structs.replace(job, tokens_key=key)
    await flow.jobs.create(msgspec.structs.replace(job, **changes))
    await queue_tokens(flow.js._nc, job)
    return job.job_id


async def writes(flow: Flow) -> int:
    """How often records were written so far."""
    return (await flow.js.stream_info("KV_JOBS")).state.last_seq


# --- nothing is swapped


async def test_where_both_models_stay_windows_are_queued_as_they_come(settings: Settings) -> None:
    async with open_flow(replace(settings, sequential_offload=False), "tokenizer") as flow:
        before = (await flow.js.stream_info(DEC)).state.last_seq
        job_id = await flow.submit(16, seed=4)  # 200 frames: four windows and a rest
        for windows in (1, 2, 3, 4):
            whole = 50 + 40 * (windows - 1)
            order = await until_queued(flow, job_id, frames=whole)
            job = await flow.until(job_id, lambda _: True)
            assert (order.last, order.schema, job.status) == (False, 2, "generating")
            assert whole <= (job.saved_frames or 0) < whole + 40
            codes, meta = await saved(flow, job)
            assert not meta.ended
            assert np.array_equal(codes, trivial_codes(job)[:, : codes.shape[1]])
            assert codes.shape[1] >= (job.saved_frames or 0)
            assert (await flow.js.stream_info(DEC)).state.messages == 1
            await decoded(flow, job_id, windows)
            await take(flow, job_id)
        job = await flow.until(job_id, lambda job: job.status == "decoding")
        order = await until_queued(flow, job_id, frames=200)
        assert (order.last, order.schema, job.frames, job.saved_frames) == (True, 1, 200, None)
        assert job.decode is not None
        assert len(job.decode.parts) == 4, "what was decoded is lost"
        assert (await flow.js.stream_info(DEC)).state.last_seq <= before + 5, "it was queued twice for the same"
        progress = [event.data.progress for event in await flow.events(job_id)]
        assert progress == sorted(progress)


# --- models take turns


async def test_without_listeners_nothing_is_written_for_windows(settings: Settings) -> None:
    """Records are written and the song is queued for its audio as often as with an engine that has no windows."""
    found = []
    for window in ((50, 40), (9999, 9999)):
        async with open_flow(replace(settings, trivial_window=window, trivial_step_ms=5), "tokenizer") as flow:
            before, queued = await writes(flow), (await flow.js.stream_info(DEC)).state.last_seq
            job_id = await flow.submit(16, seed=4)
            await flow.until(job_id, lambda job: job.status == "decoding")
            await flow.until_empty(TOK)
            dec = (await flow.js.stream_info(DEC)).state.last_seq
            found.append((await writes(flow) - before, dec - queued))
            assert await flow.stop(flow.processes[0]) == 0
    assert found[0] == found[1]


@pytest.mark.parametrize("buffered", [{"a": 0.0}, {"a": 500.0, "b": 1.0}])
async def test_a_listener_who_comes_late_finds_the_windows_that_are_whole(
    settings: Settings, buffered: dict[str, float]
) -> None:
    async with open_flow(replace(settings, trivial_step_ms=40), "tokenizer") as flow:
        job_id = await flow.submit(60, seed=4)
        await frames_made(flow, job_id, 60)
        assert (await message(flow, job_id), await message(flow, job_id, live=True)) == (None, None)
        async with listening(flow, job_id, buffered):
            order = await until_queued(flow, job_id, live=True)
            job = await flow.until(job_id, lambda _: True)
            await remove(flow, job_id, live=True)  # by a codec that cannot read the tokens, say
            later = await until_queued(flow, job_id, live=True)
            assert WINDOWS.final(later.frames) > WINDOWS.final(order.frames), "it was queued twice for the same"
        assert not order.last
        assert order.frames >= 50
        assert (job.status, job.tokens_key) == ("generating", order.tokens_key)
        assert job.saved_frames is not None
        assert job.saved_frames >= order.frames
        assert (await saved(flow, job))[0].shape[1] >= order.frames


async def test_who_has_enough_to_hear_is_served_when_the_song_leaves_the_device(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer") as flow:
        job_id = await flow.submit(60, seed=4)
        async with listening(flow, job_id, {"a": 500.0, "b": 400.0}):
            await frames_made(flow, job_id, 140)
            assert await message(flow, job_id, live=True) is None
            assert await flow.stop(flow.processes[0]) == 0
        order = await message(flow, job_id, live=True)
        job = await flow.until(job_id, lambda _: True)
        assert order is not None
        assert (job.status, job.saved_frames, job.attempts) == ("generating", order.frames, 0)
        assert order.frames >= 140
        assert (await saved(flow, job))[0].shape[1] == order.frames


async def test_a_paused_song_says_how_many_windows_are_whole_although_nobody_listens(settings: Settings) -> None:
    """A gateway that gets a listener meanwhile queues it."""
    async with open_flow(replace(settings, checkpoint_seconds=0.8), "tokenizer") as flow:
        short, long = await flow.submit(60, seed=4), await flow.submit(60, seed=5)
        await frames_made(flow, long, 95)
        assert await flow.stop(flow.processes[0]) == 0
        for job_id in (short, long):
            job = await flow.until(job_id, lambda _: True)
            assert (job.saved_frames or 0) >= 90
            assert (await saved(flow, job))[0].shape[1] == job.saved_frames
            assert await message(flow, job_id) is None


async def test_a_song_paused_below_one_window_says_nothing(settings: Settings) -> None:
    async with open_flow(replace(settings, trivial_window=(500, 400)), "tokenizer") as flow:
        job_id = await flow.submit(60, seed=4)
        async with listening(flow, job_id, {"a": 0.0}):
            await frames_made(flow, job_id, 60)
            assert await flow.stop(flow.processes[0]) == 0
        job = await flow.until(job_id, lambda _: True)
        assert (job.status, job.saved_frames, await message(flow, job_id, live=True)) == ("generating", None, None)


# --- songs that were begun before


@pytest.mark.parametrize("noted", [50, None])
async def test_a_resumed_song_is_queued_for_its_listener_at_once(settings: Settings, noted: int | None) -> None:
    """Also where the worker before died between the record and the queue, or was of a version that noted nothing."""
    async with open_flow(replace(settings, trivial_step_ms=400)) as flow:
        job_id = await put_song(flow, 200, made=52, saved_frames=noted)
        async with listening(flow, job_id, {"a": 0.0}):
            await flow.worker("tokenizer")
            order = await until_queued(flow, job_id, live=True)
        job = await flow.until(job_id, lambda _: True)
        assert 52 <= order.frames < 90, "it waited for another window"
        assert job.tokens_key == order.tokens_key
        assert np.array_equal((await saved(flow, job))[0][:, :52], trivial_codes(job)[:, :52])


async def test_a_song_whose_windows_are_decoded_is_queued_for_the_next_one(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        job_id = await put_song(flow, 200, made=60, saved_frames=60)
        await decoded(flow, job_id, 1)
        async with listening(flow, job_id, {"a": 0.0}):
            await flow.worker("tokenizer")
            order = await until_queued(flow, job_id, live=True)
            assert order.frames >= 90
            # Another codec worker decodes two windows while this one makes the song's third.
            await decoded(flow, job_id, 3)
            await take(flow, job_id, live=True)
            assert (await until_queued(flow, job_id, live=True)).frames >= 170


async def test_damaged_tokens_are_no_longer_said_to_be_there(settings: Settings) -> None:
    async with open_flow(replace(settings, checkpoint_seconds=0.8)) as flow:
        job_id = await put_song(flow, 200, made=60, saved_frames=60)
        job = await flow.until(job_id, lambda _: True)
        await flow.store.put(str(job.tokens_key), b"nonsense")
        await flow.worker("tokenizer")
        job = await flow.until(job_id, lambda now: now.tokens_key != job.tokens_key)
        assert job.saved_frames is None
        await flow.until(job_id, lambda job: job.status == "decoding")


# --- the end of a song


async def test_a_worker_that_dies_after_its_last_publication_leaves_a_record_that_is_moved_on(
    settings: Settings,
) -> None:
    async with open_flow(settings) as flow:
        job_id = await put_song(flow, 60, made=60, ended=True, saved_frames=60)
        job = await flow.until(job_id, lambda _: True)
        await queue_decode(flow.js._nc, job, str(job.tokens_key), 60)
        await flow.worker("tokenizer")
        job = await flow.until(job_id, lambda job: job.status == "decoding")
        assert (job.frames, job.saved_frames, job.fencing_token) == (60, None, None)
        await flow.until_empty(TOK)
        order = await message(flow, job_id)
        assert order is not None
        assert order.last


async def test_a_worker_that_dies_after_moving_the_record_leaves_a_song_that_is_queued(settings: Settings) -> None:
    """Its first publication found the song's windows waiting; a codec has acknowledged those, and the worker died."""
    async with open_flow(settings) as flow:
        job_id = await put_song(flow, 60, made=60, ended=True)
        await flow.jobs.update(
            job_id, TENANT, lambda job: change(job, status="decoding", frames=60, fencing_token=None)
        )
        await flow.worker("tokenizer")
        order = await until_queued(flow, job_id)
        assert (order.last, order.frames) == (True, 60)
        await flow.until_empty(TOK)


async def test_a_song_that_the_codec_moved_on_itself_is_not_made_again(settings: Settings) -> None:
    """The codec found all tokens while the record said that they were being made; their worker is dead."""
    async with open_flow(settings) as flow:
        job_id = await put_song(flow, 60, made=60, ended=True)
        await decoded(flow, job_id, 1)
        moved = await flow.jobs.update(
            job_id, TENANT, lambda job: change(job, status="decoding", frames=60, fencing_token=None)
        )
        await flow.worker("tokenizer")
        await flow.until_empty(TOK)
        assert await flow.until(job_id, lambda _: True) == moved


async def test_a_song_that_is_decoded_before_its_record_is_moved_on_has_the_same_record_then(
    settings: Settings,
) -> None:
    async with open_flow(replace(settings, trivial_step_ms=1000)) as flow:
        job_id = await put_song(flow, 60, made=60, ended=True, saved_frames=60)
        job = await flow.until(job_id, lambda _: True)
        await queue_decode(flow.js._nc, job, str(job.tokens_key), 60)
        await flow.worker("codec")
        now = await flow.until(job_id, lambda job: job.status == "decoding")
        assert (now.frames, now.saved_frames, now.fencing_token, now.tokens_key) == (60, None, None, job.tokens_key)


# --- turns


async def test_a_turn_ends_for_a_listener_and_for_nobody_else(settings: Settings) -> None:
    """The test is the codec that waits for the device. A slice is longer than the songs take."""
    settings = replace(settings, turn_seconds=3600)
    lease = Lease(as_role(settings, "codec"), gpu=CARD, role="codec", instance="test")
    async with open_flow(settings, "tokenizer") as flow:
        await lease.start()
        try:
            unheard = await flow.submit(6, seed=4)
            await frames_made(flow, unheard, 10)
            held = await lease.acquire()
            assert "paused" not in [stage.stage for stage in await stages(flow, unheard)], "the turn was cut"
            await held.release()

            heard, beside = await flow.submit(60, seed=5), await flow.submit(60, seed=6)
            await frames_made(flow, beside, 10)
            async with listening(flow, heard, {"a": 0.0}):
                async with asyncio.timeout(PATIENCE):
                    held = await lease.acquire()
                songs = [await flow.until(job_id, lambda job: job.attempts == 0) for job_id in (heard, beside)]
                assert [job.status for job in songs] == ["generating"] * 2
                assert await message(flow, heard, live=True) is not None
                frames = songs[0].saved_frames or 0
                await decoded(flow, heard, WINDOWS.final(frames))
                await take(flow, heard, live=True)
                await held.release()
                assert (await until_queued(flow, heard, live=True)).frames > frames
        finally:
            await lease.close()
