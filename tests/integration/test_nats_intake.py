"""Requests that NATS clients leave on ``intake.<tenant>``: stored, acknowledged, and submitted later."""

import json
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from nats.aio.client import Client
from nats.js.errors import APIError

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.background import deferred
from services.gateway.submission.idempotency import song_of
from shared.nats.subjects import INTAKE, TENANT, TOK, intake_subject
from shared.schema.request import MAX_BODY
from tests.integration.flow import connect_client
from tests.integration.gateway_fixtures import (
    SONG,
    RunningGateway,
    eventually,
    fresh_settings,
    in_process,
    running_gateway,
)

SUBJECT = intake_subject(TENANT)
BODY = json.dumps(SONG).encode()


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("intake")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


async def leave(client: Client, body: bytes, key: str | None = None, subject: str = SUBJECT) -> dict[str, Any]:
    """Leave a request; returns all of the answer."""
    headers = {"Nats-Msg-Id": key} if key else None
    answer: dict[str, Any] = json.loads((await client.request(subject, body, timeout=10, headers=headers)).data)
    return answer


async def waiting(gateway: RunningGateway) -> int:
    """How many requests the intake holds."""
    return (await gateway.js.stream_info(INTAKE)).state.messages


async def submitted(gateway: RunningGateway) -> None:
    """Wait until the intake is empty."""

    async def empty() -> bool:
        return not await waiting(gateway)

    await eventually(empty, "requests stay in the intake")


async def queued(gateway: RunningGateway) -> int:
    return (await gateway.js.stream_info(TOK)).state.messages


async def test_a_request_that_is_left_becomes_a_song_once(gateway: RunningGateway) -> None:
    async with connect_client(gateway.settings) as client:
        key, before = "a.song.*.>", await queued(gateway)
        ack = await client.jetstream().publish(SUBJECT, BODY, headers={"Nats-Msg-Id": key})
        assert (ack.stream, ack.duplicate) == (INTAKE, False)
        again = await client.jetstream().publish(SUBJECT, BODY, headers={"Nats-Msg-Id": key})
        assert (again.seq, again.duplicate) == (ack.seq, True)
        await gateway.event(song_of(key), "queued")
        assert (await gateway.http.get(f"/generate/{song_of(key)}/status")).json()["status"] == "queued"

        unnamed = await leave(client, BODY)
        assert (unnamed["stream"], unnamed["seq"], unnamed["duplicate"]) == (INTAKE, ack.seq + 1, False)
        await gateway.event(unnamed["job_id"], "queued")
        largest = await leave(client, BODY + b" " * (MAX_BODY - len(BODY)))
        await gateway.event(largest["job_id"], "queued")
        await client.publish(SUBJECT, BODY)  # without a reply subject

        async def all_queued() -> bool:
            return await queued(gateway) == before + 4

        await eventually(all_queued, "a request was lost")
        await submitted(gateway)
        # As on every other way in, the key finds its song for a week.
        assert (await leave(client, BODY + b" ", key))["duplicate"] is False
        await submitted(gateway)
        assert await queued(gateway) == before + 4


async def test_what_cannot_be_stored_is_answered_at_once(gateway: RunningGateway) -> None:
    async with connect_client(gateway.settings) as client:
        with pytest.raises(APIError, match="256 KiB") as refused:
            await client.jetstream().publish(SUBJECT, b" " * (MAX_BODY + 1))
        assert refused.value.err_code == 20003
        assert (await leave(client, BODY, "a key"))["error"]["err_code"] == 20001
        assert (await leave(gateway.nc, BODY, subject=intake_subject("bob")))["error"]["code"] == 401
        assert await waiting(gateway) == 0


async def test_a_request_that_cannot_be_fulfilled_becomes_an_event(gateway: RunningGateway) -> None:
    async with connect_client(gateway.settings) as client:
        events = await client.subscribe(f"events.{TENANT}.*.refused")
        await client.flush()
        key = "wrong.*"
        ack = await leave(client, b'{"lyrics": "la", "topk": 0}', key)
        assert ack["job_id"] == song_of(key)
        message = await events.next_msg(timeout=10)
        event = json.loads(message.data)
        assert message.subject == f"events.{TENANT}.{song_of(key)}.refused"
        assert (event["specversion"], event["type"]) == ("1.0", "heartmula.song.refused")
        assert (event["subject"], event["data"]["key"]) == (song_of(key), key)
        problem = event["data"]["problem"]
        assert (problem["type"], problem["status"], problem["field"]) == ("/problems/invalid-request", 422, "topk")
        await submitted(gateway)
        assert (await gateway.http.get(f"/generate/{song_of(key)}/status")).status_code == 404
        async with gateway.watch(song_of(key)) as watcher:
            assert await watcher.closed() == 4404

        # Put right, the request may have the same key; its watchers hear nothing of the other ones.
        await leave(client, BODY, key)
        await gateway.event(song_of(key), "queued")
        async with gateway.watch(song_of(key), after=0) as watcher:
            await watcher.frame()
            await leave(client, json.dumps(SONG | {"tags": "rock"}).encode(), key)
            problem = json.loads((await events.next_msg(timeout=10)).data)["data"]["problem"]
            assert problem["type"] == "/problems/idempotency-mismatch"
            await gateway.complete(song_of(key))
            frames, code = await watcher.rest()
            assert ({frame["type"] for frame in frames}, code) == (
                {"heartmula.song.queued", "heartmula.song.completed"},
                1000,
            )
        assert "cannot be read" not in gateway.log.read_text()


async def test_a_refused_request_that_comes_again_is_judged_again(gateway: RunningGateway) -> None:
    parent = await gateway.submit()
    body = json.dumps(SONG | {"continue_from": {"job_id": parent}, "max_duration_ms": 8000}).encode()
    async with connect_client(gateway.settings) as client:
        ack = await leave(client, body, "too-soon")
        await gateway.event(ack["job_id"], "refused")
        await submitted(gateway)
        again = await leave(client, body, "too-soon")
        assert (again["duplicate"], again["seq"], again["job_id"]) == (False, ack["seq"] + 1, ack["job_id"])
        await submitted(gateway)


async def test_what_was_acknowledged_is_submitted_after_everything_was_killed(
    gateway: RunningGateway, nats_server: NatsServer
) -> None:
    await submitted(gateway)
    await gateway.submit()
    config = (await gateway.js.stream_info(TOK)).config
    await gateway.js.update_stream(replace(config, max_msgs=await queued(gateway)))
    async with connect_client(gateway.settings) as client:
        kept = [(await leave(client, BODY))["job_id"] for _ in range(3)]
        refused = await gateway.http.post("/generate", json=SONG)
        assert refused.json()["type"] == "/problems/queue-full"

        async def shown() -> bool:
            return "\nheartmula_intake_waiting 3.0\n" in (await gateway.http.get("/metrics")).text

        await eventually(shown, "the requests are not counted")
        assert (await gateway.http.get("/health")).json()["queue"]["intake"] == 3
    await gateway.stop(signal.SIGKILL)
    nats_server.kill()
    await nats_server.start()
    await gateway.start()
    assert await waiting(gateway) == 3
    await gateway.js.update_stream(config)
    await submitted(gateway)
    for job_id in kept:
        assert (await gateway.job(job_id)).status == "queued"


async def test_a_request_that_has_to_wait_alone_holds_no_other_back(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "_RETRY_SECONDS", 1)
    later = SONG | {"not_before": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
    await submitted(gateway)
    await gateway.js.purge_stream(TOK)
    waits = await gateway.submit(**later)
    await gateway.stop()
    full = replace(gateway.settings, queue_limit=1)
    async with connect_client(gateway.settings) as client, in_process(full) as (_, _, base):
        for_later = [await leave(client, json.dumps(later).encode()) for _ in range(30)]
        several = await leave(client, json.dumps(SONG | {"variants": 2}).encode())
        song = await leave(client, BODY)
        await gateway.event(song["job_id"], "queued")
        assert await waiting(gateway) == len([*for_later, several])

        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
            await http.delete(f"/generate/{waits}")

        async def one_less() -> bool:
            return await waiting(gateway) == len(for_later)

        await eventually(one_less, "what waited is not tried again")
