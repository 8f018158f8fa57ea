"""Songs that go on from another one: what they keep is kept, in any batch, and whatever gets lost on the way."""

from dataclasses import replace

import numpy as np
import pytest

from services.tokenizer_worker.engines.base import Song
from shared.model.prompt import Prompter
from shared.nats.subjects import DEC
from shared.schema.event import Progress
from shared.schema.job import Job
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from shared.storage.keys import kept_tokens_key, prefixes
from tests.integration.continued_song import go_on, put_parent, tokens_of
from tests.integration.flow import Flow, open_flow
from tests.integration.ready_recording import put_recording
from tests.integration.test_turns import stages, trivial_codes
from tests.integration.test_window_publishing import until_queued
from tests.unit.native_engines import DEMO, generate, one_thread, ready  # noqa: F401

WHOLE = np.random.default_rng(0).integers(0, 64, (8, 100), dtype=np.int16)  # as no seed of the trivial engine has it


def request(frames: int, seed: int = 1, lyrics: str = "la la") -> GenerateRequest:
    """A request for a song of at most so many frames, kept ones included."""
    return GenerateRequest(lyrics=lyrics, max_duration_ms=frames * 80, seed=seed)


def expected(job: Job) -> np.ndarray:
    """The tokens of a song that keeps frames of `WHOLE` and was never interrupted, int16 ``[8, T]``."""
    codes = trivial_codes(job)
    kept = job.parent.frames if job.parent is not None else 0
    return np.column_stack((WHOLE[:, :kept], codes[:, kept:]))


async def made(flow: Flow, job_id: str) -> Job:
    """Wait until all tokens of a song are made."""
    return await flow.until(job_id, lambda job: job.status in ("decoding", "completed", "failed"))


async def assert_kept(flow: Flow, job: Job) -> None:
    """Check a song's tokens, and that its file carries on in which window it parts from the other song."""
    codes, meta = await tokens_of(flow, job)
    assert np.array_equal(codes, expected(job)), job.parent
    assert meta.ended
    if job.parent is not None:
        assert [found.frames for found in meta.earlier] == [job.parent.frames]


async def test_kept_frames_are_kept_in_any_batch_and_through_kills(settings: Settings) -> None:
    settings = replace(settings, batch=4, trivial_step_ms=30, checkpoint_seconds=0.8, turn_seconds=1.0)
    async with open_flow(settings) as flow:
        parent = await put_parent(flow, WHOLE)
        ids = [
            await go_on(flow, parent, kept, request(total, seed))
            for seed, (kept, total) in enumerate([(1, 60), (37, 90), (99, 100), (100, 160), (100, 100), (50, 120)])
        ]
        ids.append(await flow.submit(4, seed=9))
        for _ in range(2):
            worker = await flow.worker("tokenizer")
            before = await flow.until(ids[-1], lambda _: True)
            await flow.until(ids[1], lambda job: job.status != "queued")
            await flow.until_event(ids[1], "progress")
            worker.kill()
            await worker.wait()
            assert before.status != "completed"
        worker = await flow.worker("tokenizer")
        await flow.until_event(ids[-1], "progress")
        assert await flow.stop(worker) == 0
        await flow.worker("tokenizer")
        for job_id in ids:
            job = await made(flow, job_id)
            assert (job.status, job.failures) == ("decoding", 0)
            await assert_kept(flow, job)


async def test_kept_frames_count_as_made_from_the_start(settings: Settings) -> None:
    async with open_flow(replace(settings, trivial_step_ms=20)) as flow:
        job_id = await go_on(flow, await put_parent(flow, WHOLE), 50, request(100))
        await flow.worker("tokenizer")
        await made(flow, job_id)
        begun = [stage for stage in await stages(flow, job_id) if stage.stage == "generating"]
        assert [(stage.frames, stage.progress) for stage in begun] == [(50, 40.0)]
        done = [event.data.done for event in await flow.events(job_id) if isinstance(event.data, Progress)]
        assert done[0] > 50


@pytest.mark.parametrize("harm", ["damaged", "gone"])
async def test_tokens_that_are_lost_before_they_are_decoded_are_made_again_after_those_that_are_kept(
    settings: Settings, harm: str
) -> None:
    async with open_flow(settings, "tokenizer") as flow:
        job_id = await go_on(flow, await put_parent(flow, WHOLE), 50, request(60))
        job = await made(flow, job_id)
        if harm == "gone":
            await flow.store.delete_one(str(job.tokens_key))
        else:
            await flow.store.put(str(job.tokens_key), b"nonsense")
        flow.settings = replace(settings, trivial_step_ms=1000)  # the codec's: tokens can be read before the song ends
        codec = await flow.worker("codec")
        # Killed earlier, the codec may leave a record without a message, which a gateway would queue again.
        await flow.until(job_id, lambda job: job.remade == 1 and job.status != "queued")
        codec.kill()
        job = await flow.until(job_id, lambda job: job.status == "decoding" and job.frames is not None)
        await assert_kept(flow, job)
        begun = [stage.frames for stage in await stages(flow, job_id) if stage.stage == "generating"]
        assert begun == [50, 50]


async def test_what_got_lost_is_copied_again(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer") as flow:
        parent = await put_parent(flow, WHOLE)
        lost = await go_on(flow, parent, 50, request(60), copied=False)
        await assert_kept(flow, await made(flow, lost))
        assert kept_tokens_key(lost) in await flow.keys(f"tokens/{lost}/")


async def test_a_song_of_which_the_beginning_is_lost_fails_in_words_and_the_queue_moves_on(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        parent = await put_parent(flow, WHOLE)
        lost = await go_on(flow, parent, 50, request(60), copied=False)
        await flow.jobs.delete(parent)
        after = await flow.submit(1)
        await flow.worker("tokenizer")
        assert (await made(flow, after)).status == "decoding"
        job = await flow.ended(lost)
        assert job.status == "failed"
        assert f"the song that it goes on from, {parent.job_id}, was deleted or has expired" in (job.error or "")


async def test_songs_go_on_from_a_recording_whatever_becomes_of_it_and_of_what_they_took_over(
    settings: Settings,
) -> None:
    async with open_flow(replace(settings, batch=4)) as flow:
        recording = await put_recording(flow.jobs, flow.store, WHOLE)
        at_once = [await go_on(flow, recording, kept, request(110, kept)) for kept in (1, 99, 100)]
        lost = await go_on(flow, recording, 50, request(60), copied=False)
        await flow.worker("tokenizer")
        await assert_kept(flow, await made(flow, lost))
        await flow.stop(flow.processes.pop())
        late, lost_late = [await go_on(flow, recording, 50, request(60), copied=copied) for copied in (True, False)]
        await flow.jobs.delete(recording)
        await flow.store.delete(prefixes(recording)[0])
        await flow.worker("tokenizer")
        for job_id in (*at_once, late):
            await assert_kept(flow, await made(flow, job_id))
        job = await flow.ended(lost_late)
        assert f"the recording that it goes on from, {recording.job_id}, was deleted" in (job.error or "")


async def test_frames_that_another_checkpoint_made_fail_the_song_at_once(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        parent = await put_parent(flow, WHOLE + np.int16(64))
        job_id = await go_on(flow, parent, 50, request(60))
        await flow.worker("tokenizer")
        job = await flow.ended(job_id)
        assert (job.status, job.attempts, job.failures) == ("failed", 1, 0)
        assert "another model made them" in (job.error or "")


async def test_kept_windows_are_queued_for_their_audio_at_once(settings: Settings) -> None:
    """Where both models stay on the device, before the next window is whole.

    No attempt is forgotten for it: a song that kills every worker would never fail.
    """
    settings = replace(settings, sequential_offload=False, trivial_window=(50, 40), checkpoint_seconds=3600)
    async with open_flow(replace(settings, trivial_step_ms=10_000)) as flow:
        job_id = await go_on(flow, await put_parent(flow, WHOLE), 95, request(200))
        saved: set[str | None] = {None}
        for attempt in (1, 2):
            worker = await flow.worker("tokenizer")
            job = await flow.until(job_id, lambda job: job.tokens_key not in saved)
            saved.add(job.tokens_key)  # of this turn
            codes, meta = await tokens_of(flow, job)
            assert np.array_equal(codes, WHOLE[:, :95])
            assert (job.attempts, job.saved_frames, meta.ended) == (attempt, 95, False)
            order = await until_queued(flow, job_id)
            assert (order.frames, order.last) == (95, False)
            worker.kill()
            await worker.wait()
        assert (await flow.js.stream_info(DEC)).state.messages == 1


async def test_a_song_that_goes_on_at_its_end_is_the_one_that_was_asked_for_longer(settings: Settings) -> None:
    """With the demo model; variants with other seeds are made beside it, and the worker is stopped on the way."""
    lyrics = "la la la la la la la la la la\n" * 4
    settings = replace(settings, engine="native", batch=4, checkpoint_seconds=0.8)
    async with open_flow(settings, "tokenizer") as flow:
        original = await made(flow, await flow.submit(4, lyrics=lyrics, seed=4))
        codes, _ = await tokens_of(flow, original)
        assert codes.shape == (8, 50), "it ended by itself"
        ids = [await go_on(flow, original, 50, request(110, seed, lyrics)) for seed in (4, 5, 6, 7)]
        await flow.until_event(ids[0], "progress")
        assert await flow.stop(flow.processes[0]) == 0
        await flow.worker("tokenizer")
        for seed, job_id in zip((4, 5, 6, 7), ids, strict=True):
            job = await made(flow, job_id)
            found, _ = await tokens_of(flow, job)
            song = Song(prompt=Prompter(DEMO).encode("", lyrics), max_frames=110, min_frames=50, seed=seed)
            assert np.array_equal(found[:, :50], codes)
            assert np.array_equal(found[:, 50:], generate(ready(DEMO), song, codes))
            if seed == 4:
                assert np.array_equal(found, generate(ready(DEMO), replace(song, min_frames=0)))
