"""The reconciler repairs what crashes leave behind, and does not touch songs that are being made."""

import asyncio
import functools
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import msgspec
import nats
import pytest
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.background import reconciler
from services.gateway.background.reconciler import Reconciled, Reconciler
from services.gateway.monitoring.metrics import ReconcilerCounts
from shared.jobs.recordings import recording_id
from shared.jobs.store import JobStore
from shared.nats.streams import bootstrap, streams
from shared.nats.subjects import DEC, HOOKS_CONSUMER, JOBS, TENANT, TOK, decode_subject, encode_subject, token_subject
from shared.schema.base import CONTINUED_SCHEMA, DEFERRED_SCHEMA, RECORDING_SCHEMA
from shared.schema.job import ENDED, AudioPart, Decode, DecodeJob, Job, Parent, Recording, Status, TokenJob
from shared.schema.request import GenerateRequest, Priority
from shared.settings import Settings
from shared.storage.keys import (
    kept_tokens_key,
    part_key,
    part_peaks_key,
    recording_key,
    recording_part_key,
    recording_tokens_key,
    state_key,
)
from shared.storage.objects import PROBES, ObjectStore
from shared.storage.tempdirs import scratch_folder
from tests.integration.gateway_fixtures import eventually, running_gateway

NOTHING = Reconciled()


class Leftovers:
    """Servers without a gateway, and the data in them. For the reconciler all of it is old."""

    def __init__(self, settings: Settings, nc: Client) -> None:
        self.settings = settings
        self.nc, self.js = nc, nc.jetstream()
        self.jobs, self.store = JobStore(self.js), ObjectStore(settings)
        self.counts = ReconcilerCounts()
        self.reconciler = self.another()

    def another(self, pause: float = -60.0, keep: float = -60.0, keep_tokens: float | None = None) -> Reconciler:
        """Create the reconciler of another gateway."""
        settings = replace(self.settings, sweep_seconds=pause, keep_tokens_seconds=keep_tokens)
        return Reconciler(self.nc, self.store, settings, self.counts, keep)

    async def song(self, job_id: str, status: Status, *, ordered: bool = False, **fields: object) -> Job:
        """Create a song's record, and its message if it is `ordered`."""
        request = GenerateRequest(lyrics="la", seed=1)
        job = Job(job_id=job_id, tenant=TENANT, request=request, created_at=time.time(), status=status)
        job = msgspec.structs.replace(job, **fields)
        await self.jobs.create(job)
        if ordered and status == "decoding":
            await self.order_decoding(job_id, job.tokens_key or "", job.frames or 0)
        elif ordered:
            order = TokenJob(job_id=job_id, tenant=TENANT)
            await self.js.publish(token_subject("normal", job_id), msgspec.json.encode(order))
        return job

    async def recording(
        self, sha256: str, status: Status, *, tenant: str = TENANT, tokens_key: str | None = None
    ) -> Job:
        """Create a recording's record, without a message."""
        return await self.song(
            recording_id(tenant, sha256),
            status,
            tenant=tenant,
            schema=RECORDING_SCHEMA,
            recording=Recording(sha256=sha256, upload_bytes=9, upload_format="wav", channels=2),
            audio_key=recording_key(tenant, sha256),
            tokens_key=tokens_key,
        )

    async def order_decoding(
        self, job_id: str, key: str, frames: int, *, lane: Priority = "normal", last: bool = True
    ) -> None:
        order = DecodeJob(job_id=job_id, tenant=TENANT, tokens_key=key, first_frame=0, frames=frames, last=last)
        await self.js.publish(decode_subject(job_id, lane), msgspec.json.encode(order))

    async def put(self, *keys: str) -> None:
        for key in keys:
            await self.store.put(key, b"x")

    async def keys(self) -> set[str]:
        return {item.key for item in await self.store.list("") if not item.key.startswith(PROBES)}

    async def message(self, stream: str, subject: str) -> bytes | None:
        try:
            return (await self.js.get_msg(stream, subject=subject)).data
        except NotFoundError:
            return None

    async def token_job(self, job_id: str) -> TokenJob | None:
        data = await self.message(TOK, token_subject("normal", job_id))
        return msgspec.json.decode(data, type=TokenJob) if data else None

    async def passing_consumers(self) -> list[str | None]:
        """Names of the consumers on the bucket of records that are not permanent."""
        return [info.name for info in await self.js.consumers_info(f"KV_{JOBS}") if info.name != HOOKS_CONSUMER]


@pytest.fixture
async def leftovers(settings: Settings) -> AsyncIterator[Leftovers]:
    client = await nats.connect(settings.nats_url)
    leftovers = Leftovers(settings, client)
    await bootstrap(leftovers.js, settings)
    await leftovers.store.ensure_bucket()
    yield leftovers
    leftovers.store.close()
    await client.close()


async def test_objects_that_no_song_needs_are_deleted(leftovers: Leftovers) -> None:
    await leftovers.jobs.delete(await leftovers.song("deleted", "queued"))
    await leftovers.song("failed", "failed")
    await leftovers.song("cancelled", "cancelled")
    await leftovers.song("done", "completed", audio_key="audio/done/7.flac", tokens_key="tokens/done/5.safetensors")
    await leftovers.song("again", "generating", ordered=True, fencing_token=8, tokens_key="tokens/again/5.safetensors")
    needed = {
        "audio/done/7.flac",
        "audio/done/7.peaks.json",
        "audio/done/7.mp3",  # what it was converted to
        "tokens/done/5.safetensors",  # for songs that go on from it
        "tokens/again/5.safetensors",  # of an earlier turn, to go on from
        "tokens/again/8.safetensors",  # of this turn
        "audio/again/8.flac",
    }
    await leftovers.put(
        *needed,
        *("tokens/unknown/1.safetensors", "audio/unknown/1.flac", "tokens/failed/1.safetensors", "audio/failed/1.flac"),
        *("audio/cancelled/1.mp3", "tokens/done/6.safetensors", "audio/done/6.flac", "audio/done/7.flac.part"),
        *("audio/done/6.peaks.json", "audio/done/6.mp3", "audio/failed/1.peaks.json", "audio/unknown/1.ogg"),
        *("tokens/again/7.safetensors", "audio/deleted/1.flac", "tokens/done/kept.safetensors"),
    )
    await leftovers.put("elsewhere/unknown/1.flac", "audio/no-song.flac")  # not this system's
    assert await leftovers.reconciler.reconcile() == Reconciled(objects=15)
    assert await leftovers.keys() == needed | {"elsewhere/unknown/1.flac", "audio/no-song.flac"}
    assert await leftovers.reconciler.reconcile() == NOTHING
    assert leftovers.counts == ReconcilerCounts(rounds=2, objects=15)
    assert await leftovers.passing_consumers() == []


def growing(*parts: str, fence: int, sample_rate: int = 48_000) -> Decode:
    """The codec's stage of a song of which these parts are recorded."""
    found = tuple(AudioPart(key=key, size=1, samples=sample_rate) for key in parts)
    return Decode(fencing_token=fence, sample_rate=sample_rate, parts=found)


@pytest.mark.parametrize("status", ["queued", "generating", "decoding"])
async def test_a_song_that_can_be_heard_while_it_is_made_keeps_what_it_goes_on_from(
    leftovers: Leftovers, status: Status
) -> None:
    """Its parts are of several turns. Those that decoding dropped, or that a dead worker never recorded, go."""
    parts = [part_key("live", 5, 0), part_key("live", 5, 1), part_key("live", 8, 2)]
    job = await leftovers.song(
        "live",
        status,
        ordered=True,
        fencing_token=7,
        tokens_key="tokens/live/7.safetensors",
        frames=1000 if status == "decoding" else None,
        decode=growing(*parts, fence=9),
    )
    unrecorded = part_key("live", 9, 3)  # of the turn that has the song now
    needed = {*parts, state_key(parts[-1]), part_peaks_key(parts[-1]), "tokens/live/7.safetensors", unrecorded}
    await leftovers.put(
        *needed,
        *(state_key(parts[0]), part_peaks_key(parts[0]), state_key(parts[1]), part_peaks_key(parts[1])),
        *(part_key("live", 4, 0), state_key(part_key("live", 4, 0)), part_key("live", 8, 1), "audio/live/8.flac"),
    )
    assert await leftovers.reconciler.reconcile() == Reconciled(objects=8)
    assert await leftovers.keys() == needed
    assert await leftovers.jobs.get("live") == job
    assert await leftovers.reconciler.reconcile() == NOTHING


async def test_parts_of_songs_that_have_ended_are_deleted(leftovers: Leftovers) -> None:
    await leftovers.song("done", "completed", audio_key="audio/done/9.mp3", first_part=part_key("done", 9, 0))
    await leftovers.song("failed", "failed")
    kept = {"audio/done/9.mp3", "audio/done/9.flac", "audio/done/9.peaks.json", "audio/lost/3.flac"}
    await leftovers.put(*kept)
    for job_id in ("done", "failed", "lost"):  # of the last one there is no record
        part = part_key(job_id, 9, 0)
        await leftovers.put(part, state_key(part), part_peaks_key(part))
    assert await leftovers.another(keep=3600).reconcile() == Reconciled(objects=9)
    assert await leftovers.keys() == kept


@pytest.mark.parametrize("status", ["queued", "generating", "decoding"])
async def test_what_a_song_took_over_from_another_one_is_kept_until_it_has_ended(
    leftovers: Leftovers, status: Status
) -> None:
    parent = Parent(job_id="origin", frames=5, least_frames=6)
    made: dict[str, object] = {"tokens_key": "tokens/live/7.safetensors", "frames": 9} if status == "decoding" else {}
    await leftovers.song("live", status, ordered=True, schema=CONTINUED_SCHEMA, parent=parent, **made)
    await leftovers.song("other", "queued", ordered=True)
    for ended in get_args(Status):
        if ended in ENDED:
            await leftovers.song(ended, ended, schema=CONTINUED_SCHEMA, parent=parent)
    needed = {kept_tokens_key("live"), *([str(made["tokens_key"])] if made else [])}
    await leftovers.put(*needed, *map(kept_tokens_key, ("completed", "failed", "cancelled", "unknown", "other")))
    assert await leftovers.reconciler.reconcile() == Reconciled(objects=5)
    assert await leftovers.keys() == needed


async def test_a_song_that_goes_on_from_another_one_is_queued_for_workers_that_know_such_songs(
    leftovers: Leftovers,
) -> None:
    parent = Parent(job_id="origin", frames=5, least_frames=6)
    await leftovers.song("lost", "queued", schema=CONTINUED_SCHEMA, parent=parent)
    await leftovers.song(
        "made",
        "decoding",
        schema=CONTINUED_SCHEMA,
        parent=parent,
        tokens_key="tokens/made/5.safetensors",
        frames=50,
    )
    assert await leftovers.reconciler.reconcile() == Reconciled(songs=2)
    order = await leftovers.token_job("lost")
    assert order is not None
    data = await leftovers.message(DEC, decode_subject("made"))
    assert order.schema == msgspec.json.decode(data or b"", type=DecodeJob).schema == CONTINUED_SCHEMA


async def test_young_objects_and_songs_are_left_alone(leftovers: Leftovers) -> None:
    await leftovers.song("lost", "queued")
    await leftovers.put("tokens/unknown/1.safetensors", "audio/unknown/1.flac")
    assert await leftovers.another(3600.0).reconcile() == NOTHING
    assert len(await leftovers.keys()) == 2
    assert await leftovers.token_job("lost") is None


@pytest.mark.parametrize("status", ["queued", "generating"])
async def test_a_song_that_is_in_no_queue_is_queued_again_once(leftovers: Leftovers, status: Status) -> None:
    job = await leftovers.song("lost", status)
    # The server still remembers the message that got lost.
    subject = token_subject("normal", "lost")
    await leftovers.js.publish(subject, b"{}", headers={"Nats-Msg-Id": "lost:tok"})
    await leftovers.js.purge_stream(TOK, subject=subject)
    assert await leftovers.reconciler.reconcile() == Reconciled(songs=1)
    assert await leftovers.token_job("lost") == TokenJob(job_id="lost", tenant=TENANT)
    assert await leftovers.jobs.get("lost") == job
    assert await leftovers.reconciler.reconcile() == NOTHING
    assert await leftovers.another().reconcile() == NOTHING
    assert (await leftovers.js.stream_info(TOK)).state.messages == 1


async def test_a_song_with_tokens_is_queued_for_its_audio(leftovers: Leftovers) -> None:
    key = "tokens/lost/5.safetensors"
    job = await leftovers.song("lost", "decoding", tokens_key=key, frames=50)
    await leftovers.put(key)
    assert await leftovers.reconciler.reconcile() == Reconciled(songs=1)
    order = DecodeJob(job_id="lost", tenant=TENANT, tokens_key=key, first_frame=0, frames=50, last=True)
    data = await leftovers.message(DEC, decode_subject("lost"))
    assert msgspec.json.decode(data or b"", type=DecodeJob) == order
    assert await leftovers.jobs.get("lost") == job
    assert await leftovers.reconciler.reconcile() == NOTHING


@pytest.mark.parametrize("last", [True, False], ids=["all", "windows"])
@pytest.mark.parametrize("lane", ["high", "normal"])
async def test_a_song_that_waits_for_its_audio_in_either_lane_is_queued(
    leftovers: Leftovers, lane: Priority, last: bool
) -> None:
    key = "tokens/live/5.safetensors"
    await leftovers.song("live", "decoding", tokens_key=key, frames=50)
    await leftovers.put(key)
    await leftovers.order_decoding("live", key, 50, lane=lane, last=last)
    assert await leftovers.reconciler.reconcile() == NOTHING


@pytest.mark.parametrize("lane", ["high", "normal"])
async def test_a_song_whose_windows_wait_needs_its_tokens_all_the_same(leftovers: Leftovers, lane: Priority) -> None:
    """A message about whole windows stands for no further tokens; one about all tokens does."""
    for job_id in ("half", "whole"):
        await leftovers.song(
            job_id, "generating", tokens_key=f"tokens/{job_id}/5.safetensors", saved_frames=400, fencing_token=5
        )
        await leftovers.order_decoding(job_id, f"tokens/{job_id}/5.safetensors", 400, lane=lane, last=job_id == "whole")
    assert await leftovers.reconciler.reconcile() == Reconciled(songs=1)
    assert await leftovers.token_job("half") is not None
    assert await leftovers.token_job("whole") is None
    assert (await leftovers.js.stream_info(DEC)).state.messages == 2
    assert await leftovers.reconciler.reconcile() == NOTHING


async def test_a_song_whose_tokens_are_not_known_begins_again(leftovers: Leftovers) -> None:
    part = part_key("lost", 6, 0)
    await leftovers.song("lost", "decoding", attempts=2, frames=50, decode=growing(part, fence=6))
    await leftovers.put(part, state_key(part))
    assert await leftovers.reconciler.reconcile() == Reconciled(songs=1)
    job = await leftovers.jobs.get("lost")
    assert job is not None
    assert (job.status, job.attempts, job.frames, job.remade) == ("queued", 0, None, 1)
    assert await leftovers.token_job("lost") is not None
    assert job.decode == msgspec.structs.replace(growing(part, fence=6), fencing_token=None)  # to go on from
    assert await leftovers.message(DEC, decode_subject("lost")) is None
    assert await leftovers.reconciler.reconcile() == NOTHING
    assert await leftovers.keys() == {part, state_key(part)}


async def test_songs_that_are_alive_are_left_alone(leftovers: Leftovers) -> None:
    songs = [
        await leftovers.song("waits", "queued", ordered=True),
        await leftovers.song(
            "runs", "generating", ordered=True, fencing_token=3, tokens_key="tokens/runs/2.safetensors"
        ),
        await leftovers.song(
            "plays", "decoding", ordered=True, fencing_token=4, tokens_key="tokens/plays/3.safetensors", frames=5
        ),
    ]
    keys = {"tokens/runs/2.safetensors", "tokens/runs/3.safetensors", "tokens/plays/3.safetensors"}
    await leftovers.put(*keys, "audio/plays/4.flac")
    messages = {name: (await leftovers.js.stream_info(name)).state.last_seq for name in (TOK, DEC, f"KV_{JOBS}")}
    assert await leftovers.reconciler.reconcile() == NOTHING
    assert await leftovers.keys() == keys | {"audio/plays/4.flac"}
    assert [await leftovers.jobs.get(job.job_id) for job in songs] == songs
    assert {name: (await leftovers.js.stream_info(name)).state.last_seq for name in messages} == messages


async def test_tokens_that_a_decode_job_names_are_needed(leftovers: Leftovers) -> None:
    # The worker died between publishing the decode job and the record; another one began the song again.
    await leftovers.song("two", "generating", ordered=True, fencing_token=9)
    await leftovers.order_decoding("two", "tokens/two/5.safetensors", 50)
    await leftovers.put("tokens/two/5.safetensors", "tokens/two/4.safetensors")
    assert await leftovers.reconciler.reconcile() == Reconciled(objects=1)
    assert await leftovers.keys() == {"tokens/two/5.safetensors"}


async def test_records_that_would_expire_are_written_again(
    leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = await leftovers.song("waits", "queued", ordered=True)
    done = await leftovers.song("done", "completed")
    before = (await leftovers.js.stream_info(f"KV_{JOBS}")).state.last_seq
    assert await leftovers.reconciler.reconcile() == NOTHING
    monkeypatch.setattr(reconciler, "RENEW_AFTER", -60.0)
    assert await leftovers.reconciler.reconcile() == Reconciled(records=1)
    assert await leftovers.jobs.get("waits") == waits
    assert await leftovers.jobs.get("done") == done
    message = await leftovers.js.get_msg(f"KV_{JOBS}", subject=f"$KV.{JOBS}.{TENANT}.waits")
    assert message.seq == before + 1


async def test_a_song_that_waits_for_its_time_is_not_queued_but_kept_with_what_it_needs(
    leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = Parent(job_id="a", frames=1, least_frames=2)
    later = await leftovers.song(
        "later", "queued", schema=DEFERRED_SCHEMA, not_before=time.time() + 60, deferred=True, parent=parent
    )
    await leftovers.put(kept_tokens_key("later"))
    assert await leftovers.reconciler.reconcile() == NOTHING
    monkeypatch.setattr(reconciler, "RENEW_AFTER", -60.0)
    assert await leftovers.reconciler.reconcile() == Reconciled(records=1)
    assert await leftovers.jobs.get("later") == later
    assert await leftovers.token_job("later") is None
    assert await leftovers.keys() == {kept_tokens_key("later")}


async def test_many_songs_and_two_reconcilers_at_once(leftovers: Leftovers) -> None:
    ids = [f"song-{n}" for n in range(230)]
    await asyncio.gather(*(leftovers.song(job_id, "queued") for job_id in ids))
    await leftovers.put(*(f"tokens/unknown-{n}/1.safetensors" for n in range(20)))
    one, two = leftovers.another(), leftovers.another()
    found = await asyncio.gather(one.reconcile(), two.reconcile())
    assert sum(swept.songs for swept in found) == len(ids)
    assert (await leftovers.js.stream_info(TOK)).state.messages == len(ids)
    assert await leftovers.keys() == set()
    assert await leftovers.reconciler.reconcile() == NOTHING


async def test_what_cannot_be_read_is_left_alone(leftovers: Leftovers) -> None:
    subject = functools.partial("$KV.{}.{}.{}".format, JOBS, TENANT)
    await leftovers.js.publish(subject("torn"), b"{")
    newer = await leftovers.song("newer", "queued")
    await leftovers.js.publish(subject("newer"), msgspec.json.encode(msgspec.structs.replace(newer, schema=99)))
    await leftovers.put("audio/torn/1.flac", "audio/newer/1.flac")
    assert await leftovers.reconciler.reconcile() == NOTHING
    assert len(await leftovers.keys()) == 2


async def test_songs_for_which_there_is_no_room_wait_for_the_next_round(leftovers: Leftovers) -> None:
    await leftovers.js.update_stream(next(stream for stream in streams(1) if stream.name == TOK))
    await leftovers.song("first", "queued", ordered=True)
    await leftovers.song("lost", "queued")
    assert await leftovers.reconciler.reconcile() == NOTHING
    await leftovers.js.update_stream(next(stream for stream in streams(2) if stream.name == TOK))
    assert await leftovers.reconciler.reconcile() == Reconciled(songs=1)


async def test_the_gateway_reconciles_by_itself_and_outlives_its_servers(
    settings: Settings, nats_server: NatsServer, s3_server: S3Server
) -> None:
    async with running_gateway(settings, settings.data_dir, sweep_seconds=1.0) as gateway:
        key = "tokens/unknown/1.safetensors"

        async def gone() -> bool:
            return not await gateway.store.list(key)

        await gateway.store.put(key, b"x")
        await eventually(gone, "the object is still there")
        s3_server.kill()
        await eventually(functools.partial(_logged, gateway.log, "reconciling again later"), "no round failed")
        await s3_server.start()
        await nats_server.stop()
        await nats_server.start()
        await gateway.store.put(key, b"x")
        await eventually(gone, "the object is still there")
        assert "Traceback" not in gateway.log.read_text()
        assert "1 objects deleted" in gateway.log.read_text()


async def _logged(log: Path, words: str) -> bool:
    return words in log.read_text()


@pytest.mark.parametrize("tenant", [TENANT, "alice"])
async def test_audio_outlives_a_record_that_was_lost_but_not_one_that_was_deleted(
    leftovers: Leftovers, tenant: str
) -> None:
    await leftovers.jobs.delete(
        await leftovers.song("deleted", "completed", audio_key="audio/deleted/1.flac", tenant=tenant)
    )
    await leftovers.put("audio/deleted/1.flac")
    assert await leftovers.another(keep=3600).reconcile() == Reconciled(objects=1)
    await leftovers.put("audio/lost/1.flac", "tokens/lost/1.safetensors", "tokens/never-completed/1.safetensors")
    assert await leftovers.another(keep=3600).reconcile() == Reconciled(objects=1)
    assert await leftovers.keys() == {"audio/lost/1.flac", "tokens/lost/1.safetensors"}
    assert await leftovers.another(keep=3600, keep_tokens=0).reconcile() == Reconciled(objects=1)
    assert await leftovers.keys() == {"audio/lost/1.flac"}
    assert await leftovers.another().reconcile() == Reconciled(objects=1)


async def test_tokens_are_kept_as_long_as_is_set(leftovers: Leftovers) -> None:
    """The age counts from the song's end. The record stays as it is: writing it would report its end again."""
    jobs = []
    for job_id, age in (("old", 100), ("new", 20)):
        tokens, audio = f"tokens/{job_id}/5.safetensors", f"audio/{job_id}/7.flac"
        await leftovers.put(tokens, audio)
        ended = time.time() - age
        jobs.append(await leftovers.song(job_id, "completed", audio_key=audio, tokens_key=tokens, completed_at=ended))
    assert await leftovers.another(keep_tokens=1000).reconcile() == NOTHING
    assert await leftovers.another(keep_tokens=60).reconcile() == Reconciled(objects=1)
    assert await leftovers.keys() == {"audio/old/7.flac", "audio/new/7.flac", "tokens/new/5.safetensors"}
    assert [await leftovers.jobs.get(job.job_id) for job in jobs] == jobs
    assert await leftovers.another(keep_tokens=0).reconcile() == Reconciled(objects=1)


async def test_folders_of_killed_processes_are_removed(leftovers: Leftovers) -> None:
    """What a process is writing is locked; a folder may be there a moment before it is."""
    parent = leftovers.settings.data_dir / "tmp"
    with scratch_folder(parent) as locked:
        for name in ("song-killed", "song-young", "others"):
            (parent / name).mkdir()
            (parent / name / "upload").write_bytes(b"x")
        for name in (locked.name, "song-killed", "others"):
            os.utime(parent / name, (1, 1))
        await leftovers.reconciler.reconcile()
        assert {path.name for path in parent.iterdir()} == {locked.name, "song-young", "others"}


# --- recordings

SHAS = dict(
    zip(("queued", "generating", "completed", "failed", "cancelled"), map("{:064x}".format, range(5)), strict=True)
)


def objects_of(sha256: str, tenant: str = TENANT) -> set[str]:
    """Audio, a rendition, peaks, tokens of two encoders and the first of those of one of them."""
    audio, tokens = recording_key(tenant, sha256), recording_tokens_key(tenant, sha256, "encoder")
    earlier = recording_tokens_key(tenant, sha256, "an earlier encoder")
    folder = audio.rpartition("/")[0]
    return {audio, f"{folder}/audio.mp3", f"{folder}/audio.peaks.json", tokens, earlier, recording_part_key(tokens)}


async def test_objects_of_a_recording_are_kept_as_its_record_says(leftovers: Leftovers) -> None:
    tokens = {status: recording_tokens_key(TENANT, sha256, "encoder") for status, sha256 in SHAS.items()}
    for status in get_args(Status):
        if status in SHAS:
            await leftovers.recording(
                SHAS[status], status, tokens_key=tokens[status] if status == "completed" else None
            )
            await leftovers.put(*objects_of(SHAS[status]))
    completed = objects_of(SHAS["completed"]) - {
        recording_part_key(tokens["completed"]),
        recording_tokens_key(TENANT, SHAS["completed"], "an earlier encoder"),
    }
    needed = completed | objects_of(SHAS["queued"]) | objects_of(SHAS["generating"])
    await leftovers.put("recordings/local/abc/audio.flac", "recordings/audio.flac")  # not this system's
    # The time that is set for tokens of songs is not theirs.
    assert await leftovers.another(keep_tokens=0).reconcile() == Reconciled(objects=14, songs=2)
    assert await leftovers.keys() == needed | {"recordings/local/abc/audio.flac", "recordings/audio.flac"}
    assert await leftovers.reconciler.reconcile() == NOTHING


@pytest.mark.parametrize("tenant", [TENANT, "alice"])
async def test_a_recording_outlives_a_record_that_was_lost_but_not_one_that_was_deleted(
    leftovers: Leftovers, tenant: str
) -> None:
    deleted, lost = "d" * 64, "e" * 64
    await leftovers.jobs.delete(await leftovers.recording(deleted, "completed", tenant=tenant))
    await leftovers.put(*objects_of(deleted, tenant), *objects_of(lost, tenant))
    parts = {recording_part_key(recording_tokens_key(tenant, lost, "encoder"))}
    assert await leftovers.another(keep=3600).reconcile() == Reconciled(objects=7)
    assert await leftovers.keys() == objects_of(lost, tenant) - parts
    assert await leftovers.another().reconcile() == Reconciled(objects=5)
    assert await leftovers.keys() == set()


@pytest.mark.parametrize("status", ["queued", "generating"])
async def test_a_recording_that_is_in_no_queue_is_queued_again_once(leftovers: Leftovers, status: Status) -> None:
    job = await leftovers.recording(SHAS["queued"], status)
    await leftovers.put(recording_key(TENANT, SHAS["queued"]))
    assert await leftovers.reconciler.reconcile() == Reconciled(songs=1)
    data = await leftovers.message(DEC, encode_subject(job.job_id))
    assert msgspec.json.decode(data or b"", type=TokenJob) == TokenJob(
        schema=RECORDING_SCHEMA, job_id=job.job_id, tenant=TENANT
    )
    assert await leftovers.reconciler.reconcile() == NOTHING
    assert await leftovers.jobs.get(job.job_id) == job
    assert [(await leftovers.js.stream_info(name)).state.messages for name in (TOK, DEC)] == [0, 1]


async def test_a_recording_that_waits_for_long_does_not_expire(
    leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = await leftovers.recording(SHAS["queued"], "queued")
    await leftovers.recording(SHAS["failed"], "failed")
    await leftovers.reconciler.reconcile()
    monkeypatch.setattr(reconciler, "RENEW_AFTER", -60.0)
    assert await leftovers.reconciler.reconcile() == Reconciled(records=1)
    assert await leftovers.jobs.get(waits.job_id) == waits
