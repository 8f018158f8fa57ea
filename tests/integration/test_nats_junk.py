"""Unreadable messages in NATS are skipped and counted, wherever they are, and the system continues to work."""

import re
from collections.abc import AsyncIterator

import msgspec
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server
from shared.nats.subjects import GPU_LOCK, JOBS, TENANT, WORKERS, event_subject, job_subject
from shared.schema.event import Progress as ProgressEvent
from shared.schema.event import cloud_event
from tests.integration.gateway_fixtures import RunningGateway, eventually, fresh_settings, running_gateway

DEEP = b'{"deep":' + b"[" * 30_000
JUNK = (
    b"junk",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b'{"job_id":"\xff"}',
    DEEP,
    b'{"schema": 1, "job_id": "' + b"x" * 1000 + b'"}',
)


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("nats-junk")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with running_gateway(settings, folder, sweep_seconds=1) as gateway:
        await gateway.heartbeat("tokenizer")
        yield gateway


async def figure(gateway: RunningGateway, name: str) -> float:
    """Value of one of the gateway's metrics."""
    found = re.findall(rf"^heartmula_{re.escape(name)} (\S+)$", (await gateway.http.get("/metrics")).text, re.MULTILINE)
    return float(found[0])


async def unreadable(gateway: RunningGateway) -> dict[str, float]:
    """How many unreadable messages the gateway has met, by what they should have been."""
    kinds = ("record", "event", "heartbeat", "lease")
    return {what: await figure(gateway, f'unreadable_total{{what="{what}"}}') for what in kinds}


async def check_service_works(gateway: RunningGateway) -> None:
    """Check that a song is made, listed and followed, and that devices and health are shown."""
    job_id = await gateway.submit()
    async with gateway.watch(job_id) as watcher:
        assert (await watcher.frame())["type"] == "snapshot"
        await gateway.complete(job_id)
        frames, code = await watcher.rest()
        assert (frames[-1]["type"], code) == ("heartmula.song.completed", 1000)
    answer = await gateway.http.get("/generate")
    assert answer.status_code == 200, answer.text
    assert job_id in [song["job_id"] for song in answer.json()["songs"]]
    for path in ("/api/gpu", "/health", "/metrics", f"/generate/{job_id}/status"):
        answer = await gateway.http.get(path)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("junk", JUNK)
async def test_junk_in_a_bucket_or_the_events_stops_nothing(gateway: RunningGateway, junk: bytes) -> None:
    await gateway.heartbeat("tokenizer")
    before = await unreadable(gateway)
    job_id = await gateway.submit()
    async with gateway.watch(job_id, after=0) as watcher:
        assert (await watcher.frame())["type"] == "snapshot"
        for subject in (
            *(job_subject(TENANT, "junk"), f"$KV.{JOBS}.{TENANT}.*", f"$KV.{JOBS}.>", f"$KV.{JOBS}.{TENANT}.a.b"),
            *(f"$KV.{WORKERS}.codec.junk", f"$KV.{WORKERS}.*.junk", f"$KV.{WORKERS}.>"),
            f"$KV.{GPU_LOCK}.gpu-1.codec.junk",
            *(event_subject(TENANT, job_id, kind) for kind in ("stage", "progress", "completed")),
        ):
            await gateway.js.publish(subject, junk)
        await gateway.move_to(job_id, "generating")
        await gateway.progress(job_id, 30)
        kinds = []
        while "heartmula.song.progress" not in kinds:
            kinds.append((await watcher.frame())["type"])
    await check_service_works(gateway)
    rounds = await figure(gateway, "sweeper_rounds_total")

    async def swept() -> bool:
        return await figure(gateway, "sweeper_rounds_total") > rounds

    await eventually(swept, "no sweeper round ended")
    assert await figure(gateway, "sweeper_failures_total") == 0

    async def counted() -> bool:  # heartbeats are read beside answers, which show those that were read before
        after = await unreadable(gateway)
        return all(after[what] > before[what] for what in before)

    await eventually(counted, f"not everything was counted: {before}, {await unreadable(gateway)}")
    assert (await gateway.http.get(f"/generate/{job_id}/status")).json()["status"] == "generating"
    assert "Traceback" not in gateway.log.read_text()


async def test_an_event_after_one_that_cannot_be_read_is_not_missed_by_a_client_that_comes_again(
    gateway: RunningGateway,
) -> None:
    job_id = await gateway.submit()
    await gateway.move_to(job_id, "generating")
    await gateway.progress(job_id, 10)
    seen = (await gateway.event(job_id, "progress")).seq
    await gateway.progress(job_id, 20)
    await gateway.js.publish(event_subject(TENANT, job_id, "progress"), DEEP)
    async with gateway.watch(job_id, after=seen) as watcher:
        assert (await watcher.frame())["type"] == "snapshot"
        assert (await watcher.frame())["data"]["progress"] == 20


async def test_events_and_records_count_for_the_song_of_their_subject_alone(gateway: RunningGateway) -> None:
    """A client that may write under its own subject cannot change another client's song."""
    victim, own = await gateway.submit(), await gateway.submit()
    record = await gateway.job(victim)
    event = cloud_event(ProgressEvent(job_id=victim, status="generating", progress=99, done=99, total=100), "1")
    async with gateway.watch(victim) as watcher:
        await watcher.frame()
        await gateway.js.publish(event_subject(TENANT, own, "progress"), msgspec.json.encode(event))
        foreign = msgspec.structs.replace(record, status="failed", completed_at=1.0, error="no")
        await gateway.js.publish(job_subject("bob", victim), msgspec.json.encode(foreign))
        await gateway.js.publish(job_subject(TENANT, "another"), msgspec.json.encode(foreign))
        await gateway.progress(victim, 5)
        frame = await watcher.frame()
        while frame["type"] != "heartmula.song.progress":
            frame = await watcher.frame()
        assert frame["data"]["progress"] == 5
    listed = {
        song["job_id"]: song["status"] for song in (await gateway.http.get("/generate?limit=100")).json()["songs"]
    }
    assert listed[victim] == "queued"
    assert "another" not in listed


@pytest.mark.parametrize("key", ["tokens/other/1.safetensors", "audio/other/1.flac", "tokens/{}/../other/1.flac"])
async def test_a_record_that_names_another_songs_audio_serves_none(gateway: RunningGateway, key: str) -> None:
    await gateway.store.put("audio/other/1.flac", b"another song")
    job_id = await gateway.submit()
    await gateway.complete(job_id)
    record = msgspec.structs.replace(await gateway.job(job_id), audio_key=key.format(job_id))
    await gateway.js.publish(job_subject(TENANT, job_id), msgspec.json.encode(record))
    answer = await gateway.http.get(f"/generate/{job_id}/result")
    assert answer.status_code == 409
    assert "cannot be read by this version" in answer.json()["detail"]
