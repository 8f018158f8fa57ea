"""The flow of a job between the workers, on real servers, with an engine that needs no model."""

import asyncio
import io
import signal
import time
import uuid
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import soundfile
from nats.js.api import DeliverPolicy

from deploy.local.servers.embedded import NatsServer, S3Server
from services.codec_worker.token_fetch import fetch_tokens
from shared.audio.peaks import PeaksBody
from shared.errors import TokensLost
from shared.jobs.store import change
from shared.nats.streams import purge_job
from shared.nats.subjects import DEC, FAULTS, TENANT, TOK, cancel_subject, decode_subject, token_subject
from shared.schema.base import VERSION
from shared.schema.event import Stage
from shared.schema.job import DecodeJob, Job
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from shared.storage.keys import peaks_key
from shared.storage.token_file import TokenMeta, pack, unpack
from tests.integration.flow import PATIENCE, Flow, open_flow, overlaps

SMALL = 60  # MB: room for either model of the trivial engine (40 and 30), not for both


async def test_songs_become_audio_and_the_models_are_never_on_the_device_together(settings: Settings) -> None:
    settings = replace(settings, cpu_device_mb=SMALL, output_path=settings.data_dir / "out")
    async with open_flow(settings, "tokenizer", "codec") as flow:
        ids = [await flow.submit(seconds, seed=n) for n, seconds in enumerate((4, 1.04, 0.08))]
        jobs = [await flow.ended(job_id) for job_id in ids]
        assert [job.status for job in jobs] == ["completed"] * 3, jobs
        for job, frames in zip(jobs, (50, 13, 1), strict=True):
            assert (job.frames, job.duration_s) == (frames, frames * 0.08)
            assert job.audio_key is not None
            data = await flow.store.get(job.audio_key)
            audio, rate = soundfile.read(io.BytesIO(data))
            assert (rate, audio.shape) == (8000, (frames * 640, 2))
            assert np.abs(audio).max() > 0.1
            assert (settings.data_dir / "out" / f"{job.job_id}.flac").read_bytes() == data
        await flow.until_event(ids[-1], "completed")
        for process in flow.processes:
            assert await flow.stop(process) == 0
        # Nothing else is left of the way: no messages, nothing on the device, no scratch files.
        keys = [str(job.audio_key) for job in jobs]
        tokens = [str(job.tokens_key) for job in jobs]
        assert await flow.keys() == sorted(keys + [peaks_key(key) for key in keys] + tokens)
        for stream in (TOK, DEC):
            assert (await flow.js.stream_info(stream)).state.messages == 0
        journal = flow.journal()
        labels = {str(move["label"]).split()[0] for move in journal}
        assert labels == {"heartmula", "heartcodec", "kv-cache", "decode"}
        assert overlaps(journal) == 0
        assert not list(settings.data_dir.glob("device/*/*.account"))
        assert not list((settings.data_dir / "tmp").iterdir())


async def test_a_completed_song_keeps_its_tokens_and_they_tell_how_it_was_made(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer", "codec") as flow:
        job = await flow.ended(await flow.submit(2, seed=7, tags="piano", lyrics="[Verse]\nÉtoile"))
        codes, meta = unpack(await flow.store.get(str(job.tokens_key)), job.job_id)
        assert codes.shape == (8, 25)
        made = TokenMeta(
            job_id=job.job_id, model="trivial", seed=7, tags="piano", lyrics="[Verse]\nÉtoile", version=VERSION
        )
        assert meta == made


async def test_a_song_in_every_format_comes_with_its_peaks(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer", "codec") as flow:
        songs = {name: await flow.submit(2, format=name) for name in ("flac", "wav", "mp3", "ogg")}
        for audio_format, job_id in songs.items():
            job = await flow.ended(job_id)
            audio, rate = soundfile.read(io.BytesIO(await flow.store.get(str(job.audio_key))))
            peaks = msgspec.json.decode(await flow.store.get(peaks_key(str(job.audio_key))), type=PeaksBody)
            assert (peaks.sample_rate, peaks.length) == (rate, -(-len(audio) // peaks.samples_per_pixel))
            assert len(peaks.data) == 2 * peaks.length
            loudest = np.abs(audio.mean(axis=1)).max() * 127
            assert max(abs(value) for value in peaks.data) == pytest.approx(
                loudest, abs=1.5 if audio_format == "flac" else 8
            )


async def test_every_step_is_published_and_progress_never_goes_back(settings: Settings) -> None:
    async with open_flow(replace(settings, trivial_step_ms=20), "tokenizer", "codec") as flow:
        job_id = await flow.submit(4)
        await flow.ended(job_id)
        await flow.until_event(job_id, "completed")
        events = [event.data for event in await flow.events(job_id)]
        stages = [(event.stage, event.phase) for event in events if isinstance(event, Stage)]
        assert stages == [
            ("loading", 0),
            ("generating", 1),
            ("waiting", None),
            ("loading", 2),
            ("decoding", 3),
            ("storing", 3),
        ]
        progress = [event.progress for event in events]
        assert progress == sorted(progress)
        assert progress[-1] == 100
        assert len({value for value in progress if 0 < value < 80}) >= 3


async def test_the_same_seed_gives_the_same_song(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer", "codec") as flow:
        keys = [(await flow.ended(await flow.submit(2, seed=seed, format="wav"))).audio_key for seed in (5, 5, 6)]
        first, second, third = [soundfile.read(io.BytesIO(await flow.store.get(str(key))))[0] for key in keys]
        assert np.array_equal(first, second)
        assert not np.array_equal(first, third)


async def test_the_high_lane_goes_first(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        ids = [await flow.submit(0.8), await flow.submit(0.8), await flow.submit(0.8, priority="high")]
        await flow.worker("tokenizer")
        await flow.worker("codec")
        jobs = [await flow.ended(job_id) for job_id in ids]
        started = [job.started_at or 0 for job in jobs]
        assert started[2] < started[0] < started[1]


async def cancel(flow: Flow, job_id: str) -> None:
    await flow.jobs.update(job_id, "local", lambda job: change(job, status="cancelled"))
    await purge_job(flow.js, job_id)
    await flow.js._nc.publish(cancel_subject(job_id), b"")


async def test_cancelled_songs_stop_and_free_the_device_for_the_next(settings: Settings) -> None:
    # Ten minutes long unless it is stopped.
    async with open_flow(replace(settings, trivial_step_ms=500), "tokenizer", "codec") as flow:
        running, queued = await flow.submit(96), await flow.submit(96)
        await flow.until(running, lambda job: job.status == "generating")
        await flow.until_event(running, "progress")
        for job_id in (queued, running):
            await cancel(flow, job_id)
        next_one = await flow.submit(0.16)
        assert (await flow.ended(next_one)).status == "completed"
        for job_id in (queued, running):
            job = await flow.jobs.get(job_id)
            assert job is not None
            assert job.status == "cancelled"
        kept = [(await flow.ended(next_one)).tokens_key]
        async with asyncio.timeout(PATIENCE):
            while await flow.keys("tokens/") != kept:  # others are cleared away while the next song is made
                await asyncio.sleep(0.05)
        queued_job = await flow.jobs.get(queued)
        assert queued_job is not None
        assert queued_job.started_at is None


async def test_a_song_is_cancelled_while_it_is_decoded(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer") as flow:
        job_id = await flow.submit(100)
        await flow.until(job_id, lambda job: job.status == "decoding")
        flow.settings = replace(settings, trivial_step_ms=1000)
        await flow.worker("codec")
        await flow.until(job_id, lambda job: job.decode is not None)
        await cancel(flow, job_id)
        flow.settings = settings
        after = await flow.submit(0.16)
        assert (await flow.ended(after)).status == "completed"
        assert await flow.keys(f"audio/{job_id}") == []


async def test_a_killed_tokenizer_costs_no_song(settings: Settings) -> None:
    settings = replace(settings, trivial_step_ms=40, sequential_offload=True)
    async with open_flow(settings, "tokenizer", "codec") as flow:
        ids = [await flow.submit(4), await flow.submit(4)]
        await flow.until(ids[0], lambda job: job.status == "generating")
        await flow.until_event(ids[0], "progress")
        flow.processes[0].kill()
        await flow.worker("tokenizer")
        jobs = [await flow.ended(job_id) for job_id in ids]
        assert [job.status for job in jobs] == ["completed", "completed"]
        assert len(await flow.keys("audio/")) == 4  # each with its peaks
        assert overlaps(flow.journal()) == 0


async def test_a_killed_codec_costs_no_song(settings: Settings) -> None:
    async with open_flow(replace(settings, trivial_step_ms=300), "codec") as flow:
        flow.settings = settings
        await flow.worker("tokenizer")
        job_id = await flow.submit(30)
        await flow.until(job_id, lambda job: job.status == "decoding" and job.decode is not None)
        flow.processes[0].kill()
        await flow.worker("codec")
        job = await flow.ended(job_id)
        assert (job.status, job.duration_s) == ("completed", 30)
        await flow.until_empty(DEC)
        assert len(await flow.keys("audio/")) == 2  # with its peaks


async def test_a_song_that_kills_every_worker_fails(settings: Settings) -> None:
    # Nothing is saved meanwhile: a song that gets further is not to blame.
    async with open_flow(replace(settings, trivial_step_ms=100, checkpoint_seconds=60)) as flow:
        poison = await flow.submit(80)
        for attempt in range(1, 6):

            def begun(job: Job, attempt: int = attempt) -> bool:
                return job.attempts == attempt

            worker = await flow.worker("tokenizer")
            await flow.until(poison, begun)
            worker.kill()
            await worker.wait()
        flow.settings = settings
        for role in ("tokenizer", "codec"):
            await flow.worker(role)
        after = await flow.submit(1)
        assert (await flow.ended(after)).status == "completed"
        job = await flow.ended(poison)
        assert job.status == "failed"
        assert "5 times" in (job.error or "")


async def test_sigterm_gives_the_song_back_without_counting_an_attempt(settings: Settings) -> None:
    async with open_flow(replace(settings, trivial_step_ms=100), "tokenizer", "codec") as flow:
        job_id = await flow.submit(60)
        for _ in range(4):  # more often than a song may fail
            await flow.until_event(job_id, "progress")
            assert await flow.stop(flow.processes[-1 if _ else 0]) == 0
            job = await flow.jobs.get(job_id)
            assert job is not None
            assert (job.status, job.attempts) == ("generating", 0)
            await flow.worker("tokenizer")
            await flow.until(job_id, lambda job: job.attempts == 1)
        assert await flow.stop(flow.processes[-1]) == 0
        flow.settings = settings
        await flow.worker("tokenizer")
        assert (await flow.ended(job_id)).status == "completed"


async def test_a_nats_restart_in_the_middle_costs_no_song(settings: Settings, nats_server: NatsServer) -> None:
    async with open_flow(replace(settings, trivial_step_ms=40, lease_ttl=6), "tokenizer", "codec") as flow:
        ids = [await flow.submit(6), await flow.submit(6)]
        await flow.until_event(ids[0], "progress")
        nats_server.kill()
        await asyncio.sleep(0.5)
        await nats_server.start()
        assert [(await flow.ended(job_id)).status for job_id in ids] == ["completed", "completed"]
        assert len(await flow.keys("audio/")) == 4  # each with its peaks
        assert all(process.returncode is None for process in flow.processes)


async def test_a_store_restart_in_the_middle_costs_no_song(settings: Settings, s3_server: S3Server) -> None:
    async with open_flow(replace(settings, trivial_step_ms=40), "tokenizer", "codec") as flow:
        job_id = await flow.submit(2)
        await flow.until_event(job_id, "progress")
        s3_server.kill()
        await asyncio.sleep(4)
        await s3_server.start()
        job = await flow.ended(job_id)
        assert (job.status, job.error) == ("completed", None)


async def test_a_holder_that_lost_its_lease_stops_before_its_next_step(settings: Settings) -> None:
    settings = replace(settings, trivial_step_ms=50, sequential_offload=True)
    async with open_flow(settings, "tokenizer", "codec") as flow:
        job_id = await flow.submit(8)
        await flow.until_event(job_id, "progress")
        stopped = flow.processes[0]
        first = await flow.jobs.get(job_id)
        assert first is not None
        stopped.send_signal(signal.SIGSTOP)
        await asyncio.sleep(settings.lease_ttl + 1)
        stopped.send_signal(signal.SIGCONT)
        # It finds its lease gone, frees the device, gives the song back, and makes it in another turn.
        second = await flow.until(job_id, lambda job: job.fencing_token not in (None, first.fencing_token))
        assert second.attempts == 1  # the first one is not held against it
        assert (await flow.ended(job_id)).status == "completed"
        assert overlaps(flow.journal()) == 0
        moves = [move["move"] for move in flow.journal() if move["label"] == "heartmula"]
        assert moves == ["place", "remove", "place", "remove"]


@pytest.mark.parametrize("harm", ["damaged", "gone"])
async def test_tokens_that_are_damaged_or_gone_are_made_again(settings: Settings, harm: str) -> None:
    async with open_flow(settings, "tokenizer") as flow:
        job_id = await flow.submit(1)
        await flow.until(job_id, lambda job: job.status == "decoding")
        await damage_tokens(flow, job_id, harm)
        await flow.worker("codec")
        job = await flow.ended(job_id)
        assert (job.status, job.remade, job.duration_s) == ("completed", 1, 0.96)


async def damage_tokens(flow: Flow, job_id: str, harm: str) -> None:
    """Delete or damage the stored tokens of a song."""
    (key,) = await flow.keys(f"tokens/{job_id}/")
    if harm == "gone":
        await flow.store.delete(key)
    else:
        data = bytearray(await flow.store.get(key))
        data[-1] ^= 1
        await flow.store.put(key, bytes(data))


async def test_a_song_whose_tokens_never_last_fails_with_a_reason_and_the_queue_moves_on(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer") as flow:
        bad = await flow.submit(1)
        await flow.until(bad, lambda job: job.status == "decoding")
        await damage_tokens(flow, bad, "damaged")
        await flow.jobs.update(bad, "local", lambda job: change(job, remade=2))  # as often as is tried
        await flow.worker("codec")
        assert (await flow.ended(await flow.submit(1))).status == "completed"
        job = await flow.ended(bad)
        assert (job.status, job.remade) == ("failed", 2)
        assert "checksum" in (job.error or "")
        await flow.until_event(bad, "failed")
        message = await flow.js.get_last_msg(FAULTS, f"dead.codec.{bad}")
        assert "checksum" in (message.headers or {})["Reason"]


async def test_a_decode_job_that_names_deleted_tokens_costs_no_remake(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer") as flow:
        job_id = await flow.submit(1)
        await flow.until(job_id, lambda job: job.status == "decoding")
        await purge_job(flow.js, job_id)
        await publish_decode_job(
            flow, job_id, f"tokens/{job_id}/0.safetensors", 13
        )  # by a worker that had lost its lease
        await flow.worker("codec")
        job = await flow.ended(job_id)
        assert (job.status, job.remade, job.failures, job.duration_s) == ("completed", 0, 0, 0.96)
        assert await flow.keys("tokens/") == [job.tokens_key]


async def test_a_song_whose_record_still_names_a_checkpoint_is_decoded_whole(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        _, whole, job = await half_made_song(flow)
        await flow.store.put(whole, packed_tokens(job, 12, ended=True))
        await publish_decode_job(flow, job.job_id, whole, 12)
        await flow.worker("codec")
        done = await flow.ended(job.job_id)
        assert (done.status, done.remade, done.frames, done.tokens_key) == ("completed", 0, 12, whole)
        while await flow.keys("tokens/") != [whole]:  # the checkpoint goes soon after
            await asyncio.sleep(0.05)


async def test_tokens_that_the_record_names_only_after_the_claim_are_found(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        part, whole, job = await half_made_song(flow)
        order = DecodeJob(job_id=job.job_id, tenant="local", tokens_key="gone", first_frame=0, frames=12, last=True)
        with pytest.raises(TokensLost, match="the first 5 frames only"):  # a checkpoint is never taken for the song
            await fetch_tokens(job, order, flow.store, flow.jobs)
        await flow.store.put(whole, packed_tokens(job, 12, ended=True))
        await flow.jobs.update(job.job_id, "local", lambda job: change(job, tokens_key=whole, frames=12))
        await flow.store.delete_one(part)
        assert (await fetch_tokens(job, order, flow.store, flow.jobs)).codes.shape == (8, 12)


async def half_made_song(flow: Flow) -> tuple[str, str, Job]:
    """Store a song that is being made, with a checkpoint; returns its key, a key for the whole song, and the record."""
    job_id = str(uuid.uuid4())
    part, whole = f"tokens/{job_id}/5.safetensors", f"tokens/{job_id}/9.safetensors"
    request = GenerateRequest(lyrics="la", seed=1, max_duration_ms=960)
    job = Job(
        job_id=job_id,
        tenant="local",
        request=request,
        created_at=time.time(),
        status="generating",
        fencing_token=9,
        tokens_key=part,
    )
    await flow.jobs.create(job)
    await flow.store.put(part, packed_tokens(job, 5, ended=False))
    return part, whole, job


def packed_tokens(job: Job, frames: int, *, ended: bool) -> bytes:
    """Token file of a song, with zeros as codes."""
    return pack(np.zeros((8, frames), np.int16), TokenMeta(job_id=job.job_id, model="m", seed=1, ended=ended))


async def publish_decode_job(flow: Flow, job_id: str, key: str, frames: int) -> None:
    """Publish a decode job."""
    order = DecodeJob(job_id=job_id, tenant="local", tokens_key=key, first_frame=0, frames=frames, last=True)
    await flow.js.publish(decode_subject(job_id), msgspec.json.encode(order))


async def test_a_message_that_is_no_job_is_dead_lettered(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        await flow.js.publish(token_subject("normal", "junk"), b"{not json")
        await flow.js.publish(decode_subject("junk"), b'{"job_id": 3}')
        for role in ("tokenizer", "codec"):
            await flow.worker(role)
        assert (await flow.ended(await flow.submit(1))).status == "completed"
        subscription = await flow.js.subscribe("dead.>", stream=FAULTS, deliver_policy=DeliverPolicy.ALL)
        found = {(await subscription.next_msg(timeout=5)).subject for _ in range(2)}
        assert found == {"dead.tokenizer.junk", "dead.codec.junk"}


async def test_a_second_decode_job_for_the_same_song_changes_nothing(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer", "codec") as flow:
        job_id = await flow.submit(1)
        done = await flow.ended(job_id)
        await flow.until_empty(DEC)
        codes = np.zeros((8, 13), np.int16)
        await flow.store.put("tokens/again", pack(codes, TokenMeta(job_id=job_id, model="m", seed=1)))
        order = DecodeJob(job_id=job_id, tenant="local", tokens_key="tokens/again", first_frame=0, frames=13, last=True)
        await flow.js.publish(decode_subject(job_id), msgspec.json.encode(order))
        await flow.ended(await flow.submit(1))
        assert await flow.jobs.get(job_id) == done
        assert await flow.keys(f"audio/{job_id}/") == [done.audio_key, peaks_key(str(done.audio_key))]


async def test_without_offload_both_models_stay_on_the_device(settings: Settings) -> None:
    async with open_flow(replace(settings, sequential_offload=False), "tokenizer", "codec") as flow:
        for _ in range(3):
            assert (await flow.ended(await flow.submit(1))).status == "completed"
        moves = [(move["move"], move["label"]) for move in flow.journal() if str(move["label"]).startswith("heart")]
        assert sorted(moves) == [("place", "heartcodec"), ("place", "heartmula")]


async def test_in_hybrid_mode_only_the_codec_uses_the_device(settings: Settings) -> None:
    settings = replace(settings, hybrid_mode=True, cpu_device_mb=SMALL, gpu_id="card")
    async with open_flow(settings, "tokenizer", "codec") as flow:
        assert (await flow.ended(await flow.submit(1))).status == "completed"
        labels = {
            path.parent.name: {
                line.split('"label": "')[1].split('"')[0].split()[0] for line in path.read_text().splitlines()
            }
            for path in settings.data_dir.glob("device/*/journal.jsonl")
        }
        assert labels == {"card": {"heartcodec", "decode"}, "card-host": {"heartmula", "kv-cache"}}


async def test_a_record_of_a_newer_version_is_left_to_a_newer_worker(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        newer = await flow.submit(1)
        record = await flow.jobs.get(newer)
        assert record is not None
        data = msgspec.json.decode(msgspec.json.encode(record)) | {"schema": 99, "status": "remixing"}
        await flow.js.publish(f"$KV.JOBS.local.{newer}", msgspec.json.encode(data))
        for role in ("tokenizer", "codec"):
            await flow.worker(role)
        assert (await flow.ended(await flow.submit(1))).status == "completed"
        assert (await flow.js.get_last_msg(TOK, f"jobs.tok.normal.{newer}")).data, "the song is lost"


async def test_an_older_versions_record_and_message_are_read(settings: Settings) -> None:
    """Record and message have only the fields that the first version wrote."""
    async with open_flow(settings, "tokenizer", "codec") as flow:
        job_id = str(uuid.uuid4())
        request = {"lyrics": "la la", "tags": "pop", "max_duration_ms": 960, "seed": 3}
        record = {"schema": 1, "job_id": job_id, "tenant": TENANT, "request": request, "created_at": time.time()}
        await flow.js.publish(f"$KV.JOBS.{TENANT}.{job_id}", msgspec.json.encode(record))
        await flow.js.publish(f"jobs.tok.normal.{job_id}", msgspec.json.encode({"job_id": job_id, "tenant": TENANT}))
        assert (await flow.ended(job_id)).status == "completed"


async def test_messages_of_a_newer_version_are_left_to_a_newer_worker(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        songs = []
        for newer in ({"schema": 99}, {"schema": 99, "job_id": ["a", "list"]}):
            songs.append(job_id := await flow.submit(1))
            message = await flow.js.get_last_msg(TOK, f"jobs.tok.normal.{job_id}")
            await flow.js.delete_msg(TOK, message.seq or 0)
            data = msgspec.json.decode(message.data or b"") | newer
            await flow.js.publish(f"jobs.tok.normal.{job_id}", msgspec.json.encode(data))
        for role in ("tokenizer", "codec"):
            await flow.worker(role)
        assert (await flow.ended(await flow.submit(1))).status == "completed"
        for job_id in songs:
            assert (await flow.js.get_last_msg(TOK, f"jobs.tok.normal.{job_id}")).data, "the song is lost"
            record = await flow.jobs.get(job_id)
            assert record is not None
            assert (record.status, record.attempts) == ("queued", 0)
