"""Turns on the device: songs are paused, resumed and made side by side, and no two workers use it at once."""

import asyncio
import io
import signal
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import soundfile

from deploy.local.servers.embedded import free_port
from services.codec_worker.engines.trivial import TrivialCodec
from services.gateway.monitoring.worker_registry import WorkerRegistry
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.trivial import TrivialEngine
from shared.device.ledger import DeviceLedger
from shared.jobs.claims import claim_of
from shared.jobs.queues import queue_windows
from shared.model.prompt import Prompt, Prompter
from shared.nats.subjects import DEC, TOK, token_subject
from shared.schema.event import Stage
from shared.schema.job import Job, TokenJob
from shared.schema.worker import WorkerStatus
from shared.settings import Settings
from shared.storage.token_file import unpack
from tests.integration.flow import PATIENCE, Flow, open_flow, overlaps
from tests.integration.test_observed import figures
from tests.unit.native_engines import DEMO, generate, one_thread, ready  # noqa: F401

SMALL = 60  # MB: room for either model of the trivial engine (40 and 30), not for both


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Settings with which the models take turns, whatever the memory."""
    return replace(settings, sequential_offload=True)


def trivial_codes(job: Job) -> np.ndarray:
    """Tokens of a song that the trivial engine made without interruption, int16 ``[8, T]``."""
    engine, frames = TrivialEngine(0, 1), (job.request.max_duration_ms or 0) // 80
    return generate(engine, Song(prompt=Prompt((1,), (1,)), max_frames=frames, seed=job.request.seed or 0))


def demo_codes(jobs: list[Job]) -> list[np.ndarray]:
    """Tokens of songs that the demo checkpoint made without interruption, int16 ``[8, T]`` each."""
    engine = ready(DEMO, slots=len(jobs))
    for job in jobs:
        request = job.request
        song = Song(
            prompt=Prompter(DEMO).encode(request.tags, request.lyrics),
            max_frames=(request.max_duration_ms or 0) // 80,
            temperature=request.temperature,
            topk=request.topk,
            cfg_scale=request.cfg_scale,
            seed=request.seed or 0,
        )
        engine.admit(job.job_id, song)
    frames: dict[str, list[np.ndarray]] = {job.job_id: [] for job in jobs}
    while made := engine.step():
        for name, frame in made.items():
            if frame is not None:
                frames[name].append(frame)
    return [np.stack(frames[job.job_id], axis=1) for job in jobs]


async def assert_straight(flow: Flow, job: Job, codes: np.ndarray | None = None) -> None:
    """Check that a song has the trivial codec's audio of `codes`, by default of those made without interruption.

    And that it has kept them.
    """
    assert job.status == "completed", job
    codec, codes = TrivialCodec(0), trivial_codes(job) if codes is None else codes
    kept, _ = unpack(await flow.store.get(str(job.tokens_key)), job.job_id)
    assert np.array_equal(kept, codes)
    steps = codec.decode(codes, seed=job.request.seed or 0)
    buffer = io.BytesIO()
    audio = np.concatenate([step.audio for step in steps if step.audio is not None])
    soundfile.write(buffer, audio, codec.sample_rate, "PCM_16", format="FLAC")
    expected, _ = soundfile.read(io.BytesIO(buffer.getvalue()), dtype="int16")
    found, _ = soundfile.read(io.BytesIO(await flow.store.get(str(job.audio_key))), dtype="int16")
    assert np.array_equal(found, expected)


async def stages(flow: Flow, job_id: str) -> list[Stage]:
    """The stage events of a song."""
    return [event.data for event in await flow.events(job_id) if isinstance(event.data, Stage)]


async def until_problem(flow: Flow, role: str, what: str) -> WorkerStatus:
    """Wait until a worker's heartbeat reports a problem."""
    async with asyncio.timeout(PATIENCE):
        while True:
            for worker in await WorkerRegistry(flow.js, 2).live():
                if worker.role == role and what in (worker.problem or ""):
                    return worker
            await asyncio.sleep(0.1)


async def test_a_long_song_makes_way_and_continues_as_if_it_had_never_been_paused(settings: Settings) -> None:
    settings = replace(settings, cpu_device_mb=SMALL, trivial_step_ms=40, turn_seconds=1.0, batch=2)
    async with open_flow(settings, "tokenizer", "codec") as flow:
        long, short = await flow.submit(16, seed=4), await flow.submit(0.8, seed=5)
        first = await flow.ended(short)
        now = await flow.jobs.get(long)
        assert now is not None
        assert now.status == "generating", "the short song had to wait for the long one"
        last = await flow.ended(long)
        for job in (first, last):
            await assert_straight(flow, job)
        found = await stages(flow, long)
        paused = [stage.frames or 0 for stage in found if stage.stage == "paused"]
        begun = [stage.frames or 0 for stage in found if stage.stage == "generating"]
        assert paused, "it was never paused"
        assert begun == [0, *paused], "it did not go on where it was"
        assert overlaps(flow.journal()) == 0
        assert await flow.keys("tokens/") == sorted(str(job.tokens_key) for job in (first, last))


async def test_paused_songs_go_on_with_the_caches_that_they_had(settings: Settings) -> None:
    """They are not prefilled again, and are the songs that they would have been without a pause."""
    settings = replace(settings, engine="native", batch=2, turn_seconds=1.0, metrics_port=free_port())
    async with open_flow(settings, "tokenizer") as flow:
        flow.settings = replace(settings, engine="trivial", metrics_port=0)
        await flow.worker("codec")
        lyrics = "la la la la la la la la la la\n" * 4  # of such length that a song takes several turns
        ids = [await flow.submit(60, lyrics=lyrics, seed=4), await flow.submit(0.8, seed=5)]
        ids.append(await flow.submit(60, lyrics=lyrics, seed=6))
        jobs = [await flow.ended(job_id) for job_id in ids]
        for job, codes in zip(jobs, demo_codes(jobs), strict=True):
            await assert_straight(flow, job, codes)
        found = [stage for job_id in ids for stage in await stages(flow, job_id)]
        paused = sum(stage.stage == "paused" for stage in found)
        assert paused, "no song was ever paused"
        counted = await figures(settings.metrics_port)
        assert counted["heartmula_worker_resumed_total caches=parked"] == paused
        assert counted["heartmula_worker_resumed_total caches=prefilled"] == 0
        assert counted["heartmula_worker_parked_bytes"] > 0


async def test_a_killed_worker_costs_what_was_made_since_the_last_checkpoint(settings: Settings) -> None:
    settings = replace(settings, trivial_step_ms=30, checkpoint_seconds=0.8)
    async with open_flow(settings, "tokenizer", "codec") as flow:
        job_id = await flow.submit(8, seed=9)
        await flow.until(job_id, lambda job: job.tokens_key is not None)
        flow.processes[0].kill()
        await flow.worker("tokenizer")
        job = await flow.ended(job_id)
        await assert_straight(flow, job)
        begun = [stage.frames or 0 for stage in await stages(flow, job_id) if stage.stage == "generating"]
        assert begun[0] == 0
        assert begun[1] >= 10, "it began again"
        assert await flow.keys("tokens/") == [job.tokens_key]


async def test_a_rolling_restart_costs_no_frame(settings: Settings) -> None:
    settings = replace(settings, trivial_step_ms=50, batch=4, checkpoint_seconds=3600)
    async with open_flow(settings, "tokenizer", "codec") as flow:
        ids = [await flow.submit(8, seed=seed) for seed in range(3)]
        worker = flow.processes[0]
        for restarts in range(2):
            for job_id in ids:
                while len([s for s in await stages(flow, job_id) if s.stage == "generating"]) <= restarts:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)  # a few frames
            assert await flow.stop(worker) == 0
            worker = await flow.worker("tokenizer")
        for job_id in ids:
            job = await flow.ended(job_id)
            await assert_straight(flow, job)
            assert job.failures == 0
            found = await stages(flow, job_id)
            paused = [stage.frames or 0 for stage in found if stage.stage == "paused"]
            assert [stage.frames or 0 for stage in found if stage.stage == "generating"] == [0, *paused]


async def test_damaged_checkpoints_are_not_used(settings: Settings) -> None:
    settings = replace(settings, trivial_step_ms=30, checkpoint_seconds=0.8)
    async with open_flow(settings, "tokenizer", "codec") as flow:
        job_id = await flow.submit(8, seed=9)
        job = await flow.until(job_id, lambda job: job.tokens_key is not None)
        flow.processes[0].kill()
        await flow.store.put(str(job.tokens_key), b"nonsense")
        await flow.worker("tokenizer")
        await assert_straight(flow, await flow.ended(job_id))
        begun = [stage.frames for stage in await stages(flow, job_id) if stage.stage == "generating"]
        assert begun == [0, 0]


async def test_memory_that_another_program_holds_is_waited_for_and_reported(settings: Settings) -> None:
    settings = replace(settings, cpu_device_mb=SMALL, gpu_id="card")
    other = DeviceLedger(settings.data_dir / "device" / "card", "game.1", SMALL * 2**20)
    other.place("textures", 50 * 2**20)
    async with open_flow(settings, "tokenizer", "codec") as flow:
        job_id = await flow.submit(1)
        status = await until_problem(flow, "tokenizer", "textures of game.1")
        assert status.gpu.memory_used == 50 * 2**20
        other.close()
        job = await flow.ended(job_id)
        assert (job.status, job.failures) == ("completed", 0)
        while any(worker.problem for worker in await WorkerRegistry(flow.js, 2).live()):
            await asyncio.sleep(0.1)


async def test_songs_that_do_not_fit_side_by_side_are_made_one_after_the_other(settings: Settings) -> None:
    # Room for the caches of two: 8 MB each beside weights of 40.
    async with open_flow(replace(settings, cpu_device_mb=SMALL, batch=4), "tokenizer", "codec") as flow:
        ids = [await flow.submit(655, seed=seed) for seed in range(4)]
        jobs = [await flow.ended(job_id) for job_id in ids]
        assert [(job.status, job.failures) for job in jobs] == [("completed", 0)] * 4
        at_once = most = 0
        for move in flow.journal():
            if str(move["label"]).startswith("kv-cache"):
                at_once += 1 if move["move"] == "place" else -1
                most = max(most, at_once)
        assert (most, at_once) == (2, 0)


async def test_a_song_that_cannot_fit_says_what_to_change(settings: Settings) -> None:
    async with open_flow(replace(settings, cpu_device_mb=SMALL), "tokenizer", "codec") as flow:
        huge, small = await flow.submit(3600), await flow.submit(1)
        assert (await flow.ended(small)).status == "completed"
        job = await flow.ended(huge)
        assert job.status == "failed"
        assert "60 MB" in (job.error or "")
        assert "max_duration_ms" in (job.error or "")


async def test_two_pairs_on_one_machine_drain_one_queue(settings: Settings) -> None:
    settings = replace(settings, cpu_device_mb=SMALL, trivial_step_ms=20, turn_seconds=1.0)
    async with open_flow(settings) as flow:
        for card in ("card-a", "card-b"):
            flow.settings = replace(settings, gpu_id=card)
            for role in ("tokenizer", "codec"):
                await flow.worker(role)
        jobs = [await flow.ended(job_id) for job_id in [await flow.submit(2, seed=seed) for seed in range(12)]]
        for job in jobs:
            await assert_straight(flow, job)
        for card in ("card-a", "card-b"):
            journal = flow.journal(card)
            assert overlaps(journal) == 0
            assert {"heartmula", "heartcodec"} <= {move["label"] for move in journal}, f"{card} did nothing"


async def test_a_missing_codec_fills_its_queue_and_no_song_is_lost(settings: Settings) -> None:
    # One song may wait for tokens, four for being decoded.
    async with open_flow(replace(settings, queue_limit=1), "tokenizer") as flow:
        ids = []
        for _ in range(4):
            ids.append(await flow.submit(1))
            await flow.until(ids[-1], lambda job: job.status == "decoding")
            await flow.until_empty(TOK)  # there is room for one
        ids.append(await flow.submit(1))
        status = await until_problem(flow, "tokenizer", "is a codec worker running?")
        assert status.resident == [], "the device was taken for nothing"
        assert (await flow.until(ids[-1], lambda job: True)).status == "queued"
        await flow.worker("codec")
        assert [(await flow.ended(job_id)).status for job_id in ids] == ["completed"] * 5


async def test_a_stopped_holder_keeps_the_device_until_it_is_gone(settings: Settings) -> None:
    """Work that it queued on a GPU still runs: the next worker waits for the process, not for the lease alone."""
    settings = replace(settings, cpu_device_mb=SMALL, trivial_step_ms=50)
    async with open_flow(settings, "tokenizer", "codec") as flow:
        job_id = await flow.submit(8)
        await flow.until_event(job_id, "progress")
        flow.processes[0].send_signal(signal.SIGSTOP)
        other = await flow.worker("tokenizer")
        await asyncio.sleep(settings.lease_ttl + 2)
        assert {move["pid"] for move in flow.journal() if move["label"] == "heartmula"} == {flow.processes[0].pid}
        flow.processes[0].kill()
        assert (await flow.ended(job_id)).status == "completed"
        assert flow.journal()[-1]["pid"] != flow.processes[0].pid
        assert other.returncode is None


async def test_a_song_that_waits_in_both_lanes_is_made_once(settings: Settings) -> None:
    settings = replace(settings, trivial_step_ms=40, batch=4)
    async with open_flow(settings, "tokenizer", "codec") as flow:
        job_id = await flow.submit(4, seed=3)
        order = msgspec.json.encode(TokenJob(job_id=job_id, tenant="local"))
        await flow.js.publish(token_subject("high", job_id), order)
        await assert_straight(flow, await flow.ended(job_id))
        await flow.until_empty(TOK)
        assert len([s for s in await stages(flow, job_id) if s.stage == "generating"]) == 1
        assert await flow.stop(flow.processes[0]) == 0


@pytest.mark.parametrize(("seconds", "finished"), [(10, True), (100, False)])
async def test_a_codec_that_shuts_down_finishes_what_is_nearly_done(
    settings: Settings, seconds: float, finished: bool
) -> None:
    async with open_flow(settings, "tokenizer") as flow:
        job_id = await flow.submit(seconds, seed=2)
        await flow.until(job_id, lambda job: job.status == "decoding")
        flow.settings = replace(settings, trivial_step_ms=300)  # two seconds of music a step
        codec = await flow.worker("codec")
        await flow.until_event(job_id, "progress")
        while "decoding" not in [stage.stage for stage in await stages(flow, job_id)]:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.7)
        assert await flow.stop(codec) == 0
        job = await flow.jobs.get(job_id)
        assert job is not None
        assert (job.status == "completed") is finished
        assert claim_of(job, "codec").attempts == 0
        flow.settings = settings
        await flow.worker("codec")
        await assert_straight(flow, await flow.ended(job_id))


async def test_a_worker_that_wakes_up_late_leaves_the_song_to_the_worker_that_has_it_now(settings: Settings) -> None:
    async with open_flow(settings, "codec") as flow:
        flow.settings = replace(settings, gpu_id="card-a", trivial_step_ms=100)
        late = await flow.worker("tokenizer")
        job_id = await flow.submit(16, seed=6)
        await flow.until_event(job_id, "progress")
        late.send_signal(signal.SIGSTOP)
        flow.settings = replace(settings, gpu_id="card-b", trivial_step_ms=60)
        other = await flow.worker("tokenizer")
        while len([s for s in await stages(flow, job_id) if s.stage == "generating"]) < 2:
            await asyncio.sleep(0.1)
        late.send_signal(signal.SIGCONT)
        await asyncio.sleep(3)  # it finds out what has happened
        assert (await flow.js.stream_info(TOK)).state.messages == 1, "the message that the other one works on is gone"
        assert await flow.stop(other) == 0  # and gives it back, to the late one
        await assert_straight(flow, await flow.ended(job_id))


async def test_a_song_in_both_lanes_of_the_queue_for_audio_that_changes_hands_is_completed(settings: Settings) -> None:
    """The worker that loses it to another one comes back while that one is at work."""
    async with open_flow(settings, "tokenizer") as flow:
        job_id = await flow.submit(20, seed=3)
        job = await flow.until(job_id, lambda job: job.status == "decoding")
        flow.settings = replace(settings, trivial_step_ms=800, gpu_id="card-a")  # two seconds of music a step
        first = await flow.worker("codec")
        claimed = await flow.until(job_id, lambda job: job.decode is not None)
        flow.settings = replace(flow.settings, gpu_id="card-b")
        await flow.worker("codec")
        while sum(worker.role == "codec" for worker in await WorkerRegistry(flow.js, 2).live()) < 2:
            await asyncio.sleep(0.05)
        first.send_signal(signal.SIGSTOP)  # or it would get both messages
        await queue_windows(flow.js._nc, job, listened=True)
        await flow.until(job_id, lambda job: job.decode is not None and job.decode != claimed.decode)
        first.send_signal(signal.SIGCONT)
        await assert_straight(flow, await flow.ended(job_id))
        await flow.until_empty(DEC)
