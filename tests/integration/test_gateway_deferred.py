"""Songs that wait for their time: their record alone waits, and every gateway queues what is due, each song once."""

import json
import signal
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpx
import msgspec
import pytest
from nats.js.errors import NotFoundError

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.submission.rollback import roll_back
from shared.jobs.queues import queue_tokens
from shared.jobs.store import released
from shared.nats.subjects import JOBS, TENANT, TOK, job_subject, submit_subject, token_subject
from shared.schema.base import CONTINUED_SCHEMA, DEFERRED_SCHEMA, SCHEMA, timestamp
from shared.schema.event import Queued
from shared.schema.job import Job
from shared.storage.keys import kept_tokens_key
from tests.integration.flow import open_flow
from tests.integration.gateway_fixtures import (
    SONG,
    RunningGateway,
    eventually,
    fresh_settings,
    in_process,
    running_gateway,
)

LATER = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
DEFERRED = SONG | {"not_before": LATER.isoformat()}


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-deferred")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
async def nothing_waits(gateway: RunningGateway) -> AsyncIterator[None]:
    """Cancel what a test leaves waiting, and empty the queue of songs that were made without a worker."""
    yield
    songs = (await gateway.http.get("/generate", params={"limit": "100", "status": "queued"})).json()["songs"]
    for song in songs:
        await gateway.http.delete(f"/generate/{song['job_id']}")
    await gateway.js.purge_stream(TOK)


async def make_due(gateway: RunningGateway, *ids: str) -> None:
    """Let the time of deferred songs be now."""
    for job_id in ids:
        await gateway.jobs.update(
            job_id, TENANT, lambda job: msgspec.structs.replace(job, not_before=time.time() if job.deferred else None)
        )


async def in_queue(gateway: RunningGateway, job_id: str) -> int | None:
    """The sequence of a song's message; None where it has none."""
    try:
        return (await gateway.js.get_msg(TOK, subject=token_subject("normal", job_id))).seq
    except NotFoundError:
        return None


async def queued(gateway: RunningGateway, job_id: str) -> Job:
    """Wait until a deferred song is in the queue, and until its record says so; returns that."""

    async def found() -> Job | None:
        job = await gateway.job(job_id)
        return job if not job.deferred and await in_queue(gateway, job_id) else None

    job: Job = await eventually(found, "the song is not queued")
    return job


async def a_look(gateway: RunningGateway) -> None:
    """Return when all songs have been looked at since the call: what is due was queued then."""
    for _ in range(2):  # the look that queues the first song may not have come to the others yet
        job_id = await gateway.submit(**DEFERRED)
        await make_due(gateway, job_id)
        await queued(gateway, job_id)
        await gateway.http.delete(f"/generate/{job_id}")


async def test_a_song_waits_for_its_time_in_no_queue(gateway: RunningGateway) -> None:
    over_http = (await gateway.http.post("/generate", json=DEFERRED)).json()
    answer = await gateway.nc.request(submit_subject(TENANT), json.dumps(DEFERRED).encode(), timeout=10)
    over_nats = json.loads(answer.data)
    assert (over_nats["seq"], over_nats["duplicate"]) == (0, False)
    for taken in (over_http, over_nats):
        job_id = taken["job_id"]
        song = (await gateway.http.get(f"/generate/{job_id}")).json()
        for shown in (taken, song, (await gateway.http.get(f"/generate/{job_id}/status")).json()):
            assert (shown["status"], shown["not_before"]) == ("queued", timestamp(LATER.timestamp()))
            assert not {"queue_position", "eta"} & {name for name, value in shown.items() if value is not None}
        assert song in (await gateway.http.get("/generate")).json()["songs"]
        event = json.loads((await gateway.event(job_id, "queued")).data or b"")["data"]
        assert (event["not_before"], event["queue_position"]) == (timestamp(LATER.timestamp()), None)
        async with gateway.watch(job_id) as socket:
            assert (await socket.frame())["not_before"] == timestamp(LATER.timestamp())
        record = await gateway.js.get_msg(f"KV_{JOBS}", subject=job_subject(TENANT, job_id))
        # Versions before know nothing of a time: the schema keeps them from queueing it.
        assert json.loads(record.data or b"")["schema"] == DEFERRED_SCHEMA
        assert "not_before" not in json.loads(record.data or b"")["request"]
    assert (await gateway.js.stream_info(TOK)).state.messages == 0, "it counts as work for workers"
    assert (await gateway.http.get("/health")).json()["queue"]["tokens"] == 0
    await a_look(gateway)
    assert (await gateway.js.stream_info(TOK)).state.messages == 0, "it is queued before its time"
    assert "heartmula_songs_deferred 2.0" in (await gateway.http.get("/metrics")).text
    assert (await gateway.http.post("/generate", json=SONG)).json()["queue_position"] == 0


async def test_who_asks_for_its_audio_is_sent_away_until_its_time(gateway: RunningGateway) -> None:
    soon = datetime.now(UTC) + timedelta(minutes=30)
    for due, most in ((LATER, 3600), (soon, 1800)):
        taken = await gateway.http.post("/generate", json=SONG | {"not_before": due.isoformat()})
        place = taken.headers["Location"].removesuffix("/status")
        answers = [await gateway.http.get(f"{place}/{what}") for what in ("result", "stream", "peaks")]
        assert (await gateway.http.head(f"{place}/stream")).status_code == 409
        for answer in answers:
            assert (answer.status_code, timestamp(due.timestamp()) in answer.json()["detail"]) == (409, True)
        assert {most - 120 < int(answer.headers["Retry-After"]) <= most for answer in (taken, *answers)} == {True}


@pytest.mark.parametrize("wrong", ["soon", "2026-01-31T18:00:00", "2026-01-31", 1])
async def test_what_is_no_time_with_a_zone_is_refused(gateway: RunningGateway, wrong: object) -> None:
    answer = await gateway.http.post("/generate", json=SONG | {"not_before": wrong})
    assert (answer.status_code, answer.json()["field"]) == (422, "not_before")
    words = "not_before: must be a time with its zone, such as 2026-01-31T18:00:00Z or 2026-01-31T19:00:00+01:00"
    assert answer.json()["detail"] == words


async def test_a_time_beyond_six_days_is_refused(gateway: RunningGateway) -> None:
    for far in ("9999-12-31T23:59:59Z", (LATER + timedelta(7)).isoformat()):
        answer = await gateway.http.post("/generate", json=SONG | {"not_before": far})
        assert (answer.status_code, answer.json()["field"]) == (422, "not_before")
        assert "6 days" in answer.json()["detail"]


async def test_a_time_that_has_passed_is_no_reason_to_wait(gateway: RunningGateway) -> None:
    for moment in ("2026-01-31T18:00:00Z", "0001-01-01T00:00:00+14:00"):
        taken = (await gateway.http.post("/generate", json=SONG | {"not_before": moment})).json()
        assert (taken["queue_position"] is not None, "not_before" in taken) == (True, False)
        assert await in_queue(gateway, taken["job_id"])


async def test_it_is_queued_when_due_though_gateway_and_nats_were_killed_meanwhile(
    gateway: RunningGateway, nats_server: NatsServer
) -> None:
    job_id = await gateway.submit(**DEFERRED)
    await gateway.stop(signal.SIGKILL)
    nats_server.kill()
    await nats_server.start()
    await make_due(gateway, job_id)
    assert await in_queue(gateway, job_id) is None
    await gateway.start()
    job = await queued(gateway, job_id)
    assert job.schema == SCHEMA, "versions before can read it from now on"

    async def placed() -> bool:
        data = json.loads((await gateway.event(job_id, "queued")).data or b"")["data"]
        return (data["not_before"], data["queue_position"]) == (None, 0)

    await eventually(placed, "no event says that it is in the queue")
    status = (await gateway.http.get(f"/generate/{job_id}/status")).json()
    assert (status["queue_position"], status["not_before"]) == (0, timestamp(job.not_before or 0))


async def test_a_song_is_made_after_its_time(gateway: RunningGateway) -> None:
    due = time.time() + 1.5
    job_id = await gateway.submit(not_before=timestamp(due))
    async with open_flow(replace(gateway.settings, engine="trivial", batch=1), "tokenizer", "codec") as flow:
        job = await flow.ended(job_id)
        assert (job.status, job.deferred) == ("completed", False)
        assert job.started_at is not None
        assert job.started_at >= round(due, 3)
        await flow.until_event(job_id, "completed")
        places = [event.data for event in await flow.events(job_id) if isinstance(event.data, Queued)]
        assert [place.not_before is None for place in places] == [False, True]


async def test_two_gateways_queue_each_song_once(gateway: RunningGateway) -> None:
    ids = [await gateway.submit(**DEFERRED) for _ in range(8)]
    before = (await gateway.js.stream_info(TOK)).state.last_seq
    async with in_process(gateway.settings):
        await make_due(gateway, *ids)
        for job_id in ids:
            await queued(gateway, job_id)
    assert (await gateway.js.stream_info(TOK)).state.last_seq == before + len(ids)


async def test_a_gateway_that_died_after_the_message_has_the_song_queued_once(gateway: RunningGateway) -> None:
    job_id = await gateway.submit(**DEFERRED)
    assert (ack := await queue_tokens(gateway.nc, released(await gateway.job(job_id))))
    await make_due(gateway, job_id)
    await queued(gateway, job_id)
    assert await in_queue(gateway, job_id) == ack.seq


async def test_a_worker_that_is_quicker_than_the_gateway_keeps_the_song(gateway: RunningGateway) -> None:
    job_id = await gateway.submit(**DEFERRED)
    await gateway.move_to(job_id, "generating")
    job = await gateway.job(job_id)
    assert (job.deferred, job.schema) == (False, SCHEMA)
    await make_due(gateway, job_id)
    await a_look(gateway)
    assert await in_queue(gateway, job_id) is None


async def test_a_cancelled_song_is_not_queued(gateway: RunningGateway) -> None:
    job_id = await gateway.submit(**DEFERRED)
    assert (await gateway.http.delete(f"/generate/{job_id}")).json()["status"] == "cancelled"
    job = await gateway.job(job_id)
    assert (job.status, job.deferred, job.schema) == ("cancelled", False, SCHEMA)
    await a_look(gateway)
    assert await in_queue(gateway, job_id) is None
    assert (await gateway.http.delete(f"/generate/{job_id}", params={"forget": "true"})).status_code == 200


async def test_a_repeated_request_is_answered_with_the_same_song(gateway: RunningGateway) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first = (await gateway.http.post("/generate", json=DEFERRED, headers=key)).json()
    assert (await gateway.http.post("/generate", json=DEFERRED, headers=key)).json() == first
    other = await gateway.http.post("/generate", json=SONG, headers=key)
    assert other.json()["type"] == "/problems/idempotency-mismatch"
    await make_due(gateway, first["job_id"])
    await queued(gateway, first["job_id"])
    again = (await gateway.http.post("/generate", json=DEFERRED, headers=key)).json()
    assert (again["job_id"], again["queue_position"]) == (first["job_id"], 0)


async def test_a_refused_request_is_rolled_back_unless_its_repetition_was_accepted(gateway: RunningGateway) -> None:
    for repeated in (False, True):
        key = {"Idempotency-Key": str(uuid.uuid4())}
        job_id = (await gateway.http.post("/generate", json=DEFERRED, headers=key)).json()["job_id"]
        job = await gateway.job(job_id)
        if repeated:
            await gateway.http.post("/generate", json=DEFERRED, headers=key)
        await roll_back(gateway.js, gateway.store, job)
        assert (await gateway.jobs.get(job_id) is not None) == repeated


async def test_variants_that_go_on_from_a_song_are_queued_with_what_they_keep(gateway: RunningGateway) -> None:
    parent, _ = await gateway.made(30)
    asked = DEFERRED | {"variants": 2, "continue_from": {"job_id": parent}, "max_duration_ms": 8000}
    taken = (await gateway.http.post("/generate", json=asked)).json()
    ids = [each["job_id"] for each in taken["variants"]]
    await gateway.http.delete(f"/generate/{parent}", params={"forget": "true"})  # it is no longer needed
    await make_due(gateway, *ids)
    for job_id in ids:
        assert (await queued(gateway, job_id)).schema == CONTINUED_SCHEMA
        assert await gateway.store.get(kept_tokens_key(job_id))


async def test_only_so_many_songs_are_deferred_and_a_full_queue_keeps_none_back_for_good(
    gateway: RunningGateway,
) -> None:
    async with (
        in_process(replace(gateway.settings, queue_limit=3)) as (_, _, base),
        httpx.AsyncClient(base_url=base, trust_env=False) as http,
    ):
        ids = [(await http.post("/generate", json=DEFERRED)).json()["job_id"] for _ in range(3)]
        refused = await http.post("/generate", json=DEFERRED)
        assert (refused.status_code, refused.json()["type"]) == (429, "/problems/queue-full")
        assert "cancel one" in refused.json()["detail"]
        waiting = (await http.post("/generate", json=SONG)).json()["job_id"]
        await make_due(gateway, *ids)
        for job_id in ids[:2]:
            await queued(gateway, job_id)
        assert (await gateway.job(ids[2])).deferred, "the queue takes three"
        await http.delete(f"/generate/{waiting}")
        await queued(gateway, ids[2])
