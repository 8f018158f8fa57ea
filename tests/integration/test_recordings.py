"""Recordings are encoded beside songs: once, whatever dies, and never with another model on the device."""

import asyncio
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.local.servers.embedded import free_port
from services.codec_worker.encoder.chunks import FRAMES
from services.codec_worker.engines.identity import encoder_identity
from services.codec_worker.engines.trivial import TrivialEncoder
from services.gateway.monitoring.worker_registry import WorkerRegistry
from shared.device.lease import read_leases
from shared.jobs.queues import queue_recording, queue_tokens
from shared.model.checkpoint import open_checkpoint
from shared.nats.subjects import DEC, FAULTS, TOK, cancel_subject
from shared.settings import Settings
from shared.storage.token_file import TokenMeta, pack, unpack
from tests.integration.flow import PATIENCE, environment, open_flow, overlaps
from tests.integration.recorded import (
    CHUNK_SECONDS,
    assert_encoded,
    cancelled,
    codes_of,
    flac,
    keys_of,
    noise,
    record,
    recording_of,
    upload,
)
from tests.integration.test_observed import figures
from tests.integration.test_residency import ROOM_FOR_BOTH, ROOM_FOR_ONE

GOLDEN = Path(__file__).parents[1] / "golden/encoder/ckpt"


@pytest.mark.parametrize("mb", [ROOM_FOR_BOTH, ROOM_FOR_ONE])
async def test_recordings_are_encoded_beside_songs_and_no_two_models_meet(settings: Settings, mb: int) -> None:
    async with open_flow(replace(settings, cpu_device_mb=mb), "tokenizer", "codec") as flow:
        await flow.ended(await flow.submit(1))
        audio = noise(CHUNK_SECONDS + 3.05, channels=2)
        job = await record(flow, audio)
        songs = [await flow.submit(1, seed=seed) for seed in range(2, 4)]
        await assert_encoded(flow, await flow.ended(job.job_id), audio)
        songs.append(await flow.submit(1, seed=4))
        assert {(await flow.ended(song)).status for song in songs} == {"completed"}
        await flow.until_empty(DEC)
        assert await flow.events(job.job_id) == []
        last = await record(flow, noise(2, seed=9))
        assert (await flow.ended(last.job_id)).status == "completed"
        async with asyncio.timeout(PATIENCE):  # nothing else comes, and it leaves
            while sum(move["label"] == "encoder" for move in flow.journal()) < 4:
                await asyncio.sleep(0.05)
        roles = {worker.role for worker in await WorkerRegistry(flow.js, 2).live()}
        assert roles == {"tokenizer", "codec", "encoder"}
        for process in flow.processes:
            assert await flow.stop(process) == 0
        journal = flow.journal()
        assert overlaps(journal, "heartcodec", "encoder") == 0
        moves = [move["move"] for move in journal if move["label"] == "heartcodec"]
        if mb == ROOM_FOR_BOTH:  # it made way for the encoder, and left at the end
            assert moves == ["place", "remove", "place", "remove"]
        else:
            assert overlaps(journal) == overlaps(journal, "heartmula", "encoder") == 0
        assert await read_leases(flow.js) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_recording_whose_worker_ends_goes_on_after_the_chunks_that_were_stored(
    settings: Settings, number: int
) -> None:
    audio = noise(10 * CHUNK_SECONDS + 1)
    settings = replace(settings, trivial_step_ms=300)
    async with open_flow(settings, "codec") as flow:
        job = await record(flow, audio)
        await flow.until(job.job_id, lambda now: (now.saved_frames or 0) >= 2 * FRAMES)
        assert await flow.stop(flow.processes[0], number) == (-number if number == signal.SIGKILL else 0)
        now = await flow.jobs.get(job.job_id)
        assert now is not None
        assert (now.status, now.attempts) == ("generating", 0), "it has got further: no attempt counts"
        saved = now.saved_frames or 0
        flow.settings = replace(settings, trivial_step_ms=0, metrics_port=free_port())
        await flow.worker("codec")
        await assert_encoded(flow, await flow.ended(job.job_id), audio)
        made = (await figures(flow.settings.metrics_port, "encoder"))["heartmula_worker_frames"]
        total = codes_of(audio).shape[1] + 1  # the last one is padding
        assert made in (total - saved, total - saved - FRAMES), "stored chunks were encoded again"


async def test_a_recording_that_waits_for_another_does_not_share_the_blame_for_its_workers_death(
    settings: Settings,
) -> None:
    settings = replace(settings, trivial_step_ms=300)
    async with open_flow(settings, "codec") as flow:
        long = await record(flow, noise(20 * CHUNK_SECONDS))
        await flow.until(long.job_id, lambda now: bool(now.saved_frames))
        waits = await record(flow, noise(2, seed=1))
        saved = (await flow.until(long.job_id, lambda now: bool(now.saved_frames))).saved_frames or 0
        await flow.until(long.job_id, lambda now: (now.saved_frames or 0) >= saved + 3 * FRAMES)
        await flow.stop(flow.processes[0], signal.SIGKILL)
        assert await flow.jobs.get(waits.job_id) == waits


async def test_a_long_recording_makes_way_for_a_song_and_gets_further_in_each_turn(settings: Settings) -> None:
    """Also where a chunk takes longer than a turn."""
    settings = replace(settings, cpu_device_mb=ROOM_FOR_ONE, turn_seconds=1.0)
    async with open_flow(settings, "tokenizer") as flow:
        await flow.until(await flow.submit(1), lambda now: now.status == "decoding")  # the tokenizer is there
        flow.settings = replace(settings, trivial_step_ms=1100)
        await flow.worker("codec")
        audio = noise(4 * CHUNK_SECONDS - 1)
        job = await record(flow, audio)
        await flow.until(job.job_id, lambda now: now.status == "generating")
        song = await flow.ended(await flow.submit(1))
        encoded = await flow.ended(job.job_id)
        await assert_encoded(flow, encoded, audio)
        assert (song.completed_at or 0) < (encoded.completed_at or 0), "the song had to wait for the recording"
        assert overlaps(flow.journal(), "heartmula", "encoder") == 0
        assert sum((move["move"], move["label"]) == ("place", "encoder") for move in flow.journal()) > 1


async def test_a_recording_that_is_cancelled_stops_and_leaves_no_tokens(settings: Settings) -> None:
    async with open_flow(replace(settings, trivial_step_ms=400), "codec") as flow:
        job = await record(flow, noise(20 * CHUNK_SECONDS))
        await flow.until(job.job_id, lambda now: bool(now.saved_frames))
        await flow.jobs.update(job.job_id, job.tenant, cancelled)
        await flow.js._nc.publish(cancel_subject(job.job_id))
        short = noise(2, seed=1)
        other = await record(flow, short)
        ended = await flow.ended(other.job_id)
        await flow.until_empty(DEC)
        assert sorted(await flow.keys("recordings/")) == sorted([keys_of(job)[0], *keys_of(ended)[:2]])


async def test_audio_that_cannot_be_encoded_fails_in_words_and_other_work_goes_on(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer", "codec") as flow:
        data = bytearray(flac(noise(4)))
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        damaged = await upload(flow, bytes(data), seconds=4)
        tiny = await record(flow, noise(0.07))
        long = await upload(flow, flac(noise(9)), seconds=4)
        audio = noise(3)
        good, song = await record(flow, audio), await flow.submit(1)
        for job, words in ((damaged, "is damaged, upload it again"), (tiny, "shorter than a frame"), (long, "longer")):
            ended = await flow.ended(job.job_id)
            assert ended.status == "failed"
            assert words in (ended.error or "")
            assert ended.audio_key in await flow.keys("recordings/"), "its audio goes with its record"
        assert (await flow.ended(song)).status == "completed"
        assert (await flow.ended(good.job_id)).frames == codes_of(audio).shape[1]
        subjects = (await flow.js.stream_info(FAULTS, subjects_filter="dead.>")).state.subjects or {}
        assert {f"dead.encoder.{job.job_id}" for job in (damaged, tiny, long)} <= set(subjects)


async def test_tokens_that_this_encoder_made_before_are_used_as_they_are(settings: Settings) -> None:
    async with open_flow(settings, "codec") as flow:
        data, codes = b"not even audio", np.arange(80, dtype=np.int16).reshape(8, 10)
        job = recording_of(data, seconds=1)
        meta = TokenMeta(job_id=job.job_id, model=TrivialEncoder.identity, seed=0)
        await flow.store.put(keys_of(job)[1], pack(codes, meta))
        await upload(flow, data, seconds=1)
        ended = await flow.ended(job.job_id)
        assert (ended.status, ended.frames, ended.tokens_key) == ("completed", 10, keys_of(job)[1])


async def test_messages_in_the_queue_of_another_stage_make_nothing(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        audio = noise(1)
        job = recording_of(flac(audio), seconds=1)
        await flow.jobs.create(job)
        await queue_tokens(flow.js._nc, job)  # as if it were a song
        song = await flow.submit(1)
        named = await flow.jobs.get(song)
        assert named is not None
        await queue_recording(flow.js._nc, named)  # as if it were a recording
        for role in ("tokenizer", "codec"):
            await flow.worker(role)
        assert (await flow.ended(song)).status == "completed"
        for stream in (TOK, DEC):
            await flow.until_empty(stream)
        assert await flow.jobs.get(job.job_id) == job


async def test_where_the_encoder_cannot_fit_recordings_fail_in_words_and_songs_do_not(settings: Settings) -> None:
    settings = replace(settings, cpu_device_mb=ROOM_FOR_BOTH)
    async with open_flow(settings, "tokenizer") as flow:
        env = environment(settings, "codec")
        module = "tests.integration.huge_encoder"
        flow.processes.append(await asyncio.create_subprocess_exec(sys.executable, "-m", module, env=env))
        song = await flow.submit(1)
        job = await record(flow, noise(2))
        ended = await flow.ended(job.job_id)
        assert ended.status == "failed"
        assert "needs 1000.00 GB of the 0.03 GB of the device" in (ended.error or "")
        assert "a device with more memory holds it, HEARTMULA_SEQUENTIAL_OFFLOAD=true leaves more" in (
            ended.error or ""
        )
        assert (await flow.ended(song)).status == "completed"
        moves = [move["move"] for move in flow.journal() if move["label"] == "heartcodec"]
        assert moves == ["place"], "the codec made way for nothing"


async def test_the_native_encoder_encodes_too(settings: Settings) -> None:
    settings = replace(settings, engine="native", model_path=GOLDEN, model_version="tiny")
    async with open_flow(settings, "codec") as flow:
        job = await flow.ended((await record(flow, noise(2, channels=2))).job_id)
        assert (job.status, job.error) == ("completed", None)
        codes, meta = unpack(await flow.store.get(str(job.tokens_key)), job.job_id)
        assert codes.shape == (8, 25), "the 26th frame is padding"
        assert meta.model == encoder_identity("native", open_checkpoint(GOLDEN, "tiny"))
