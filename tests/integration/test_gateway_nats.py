"""Songs from NATS clients, and a queue that is full."""

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import httpx
import nats
import pytest
from nats.js.errors import APIError, NotFoundError
from nats.micro.request import Request
from nats.micro.service import ServiceConfig

from services.gateway.api.nats_service import Endpoint, NatsService
from services.gateway.api.reply_subjects import ReplySubjects
from services.gateway.auth.api_keys import digest_of_key
from services.gateway.monitoring.metrics import Metrics
from services.gateway.submission.idempotency import song_of
from services.gateway.tasks import BackgroundTasks
from shared.errors import InvalidRequest
from shared.nats.connection import connect
from shared.nats.subjects import EVENTS, INTAKE, JOBS, TENANT, TOK, intake_subject, submit_subject, token_subject
from shared.settings import Settings
from tests.integration.flow import as_role
from tests.integration.gateway_fixtures import SONG, RunningGateway, eventually, running_gateway

SUBJECT = submit_subject(TENANT)


async def ask(gateway: RunningGateway, body: object) -> dict[str, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer: dict[str, Any] = json.loads((await gateway.nc.request(SUBJECT, data, timeout=10)).data)
    return answer


async def test_nats_clients_ask_for_songs(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        answer = await ask(gateway, SONG)
        job_id = answer["job_id"]
        message = await gateway.js.get_msg(TOK, subject=token_subject("normal", job_id))
        base = f"/generate/{job_id}"
        assert answer == {
            "stream": TOK,
            "seq": message.seq,
            "duplicate": False,
            "job_id": job_id,
            "status": "queued",
            "status_url": f"{base}/status",
            "stream_url": f"{base}/stream",
            "result_url": f"{base}/result",
            "events_url": f"{base}/events",
            "queue_position": 0,
        }
        assert (await gateway.http.get(answer["status_url"])).json()["status"] == "queued"

        ack = await gateway.js.publish(SUBJECT, json.dumps(SONG).encode())
        assert (ack.stream, ack.duplicate) == (TOK, False)
        assert ack.seq == answer["seq"] + 1

        for body, code, words in (
            (b"{", 400, "JSON"),
            ({"lyrics": 1}, 422, "lyrics: must be text"),
            ({"lyrics": "la", "seed": "1"}, 422, "seed: must be a whole number"),
            (b"x" * 300_000, 413, "256 KiB"),
        ):
            answer = await ask(gateway, body)
            assert answer["error"]["code"] == code
            assert words in answer["error"]["description"]
            assert "(" not in answer["error"]["description"].split()[0]  # no Python repr
        with pytest.raises(APIError) as refused:
            await gateway.js.publish(SUBJECT, b'{"lyrics": "la", "topk": 0}')
        assert refused.value.code == 422
        assert refused.value.description
        assert "topk" in refused.value.description

        many = await asyncio.gather(*(ask(gateway, SONG) for _ in range(60)))
        assert len({answer["job_id"] for answer in many}) == 60

        before = (await gateway.js.stream_info(TOK)).state.messages
        await gateway.nc.publish(SUBJECT, json.dumps(SONG).encode())  # without a reply subject

        async def queued() -> bool:
            return (await gateway.js.stream_info(TOK)).state.messages == before + 1

        await eventually(queued, "a plain publish was not taken")
        assert "Traceback" not in gateway.log.read_text()


async def test_a_full_queue_refuses_and_leaves_no_record(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir, queue_limit=2) as gateway:
        first, _ = await gateway.submit(), await gateway.submit()
        answer = await gateway.http.post("/generate", json=SONG)
        assert answer.status_code == 429
        assert answer.json()["type"] == "/problems/queue-full"
        assert int(answer.headers["retry-after"]) > 0
        error = (await ask(gateway, SONG))["error"]
        assert (error["code"], error["err_code"]) == (429, 10077)

        bucket = await gateway.js.stream_info(f"KV_{JOBS}", subjects_filter=f"$KV.{JOBS}.>")
        records = []
        for subject in bucket.state.subjects or {}:
            try:
                records.append((await gateway.js.get_msg(f"KV_{JOBS}", subject=subject)).data)
            except NotFoundError:
                continue
        assert sum(bool(record) for record in records) == 2

        assert (await gateway.http.delete(f"/generate/{first}")).status_code == 200
        assert (await gateway.http.post("/generate", json=SONG)).status_code == 202


async def test_a_full_queue_costs_no_song_of_the_minute(settings: Settings) -> None:
    keys = settings.data_dir / "keys.toml"
    limits = "songs_per_minute = 0.01\nburst = 2"
    keys.write_text(f'[[tenant]]\nname = "alice"\nkeys = ["{digest_of_key("key")}"]\n{limits}\n')
    alice = {"Authorization": "Bearer key"}
    async with running_gateway(replace(settings, api_keys=keys), settings.data_dir, queue_limit=1) as gateway:
        waiting = (await gateway.http.post("/generate", json=SONG, headers=alice)).json()["job_id"]
        for _ in range(3):
            answer = await gateway.http.post("/generate", json=SONG, headers=alice)
            assert (answer.status_code, answer.json()["type"]) == (429, "/problems/queue-full")
        assert (await gateway.http.delete(f"/generate/{waiting}", headers=alice)).status_code == 200
        assert (await gateway.http.post("/generate", json=SONG, headers=alice)).status_code == 202
        answer = await gateway.http.post("/generate", json=SONG, headers=alice)
        assert answer.json()["type"] == "/problems/too-many-requests"


async def test_a_refused_song_leaves_its_key_free(settings: Settings) -> None:
    key = "a-key"

    async def post(gateway: RunningGateway) -> httpx.Response:
        return await gateway.http.post("/generate", json=SONG, headers={"Idempotency-Key": key})

    async with running_gateway(settings, settings.data_dir, queue_limit=1) as gateway:
        first = await gateway.submit()
        answers = await asyncio.gather(*(post(gateway) for _ in range(10)))
        assert {answer.status_code for answer in answers} == {429}
        assert await gateway.jobs.get(song_of(key)) is None
        assert (await gateway.http.delete(f"/generate/{first}")).status_code == 200
        answer = await post(gateway)
        assert (answer.status_code, answer.json()["job_id"]) == (202, song_of(key))
        await gateway.js.get_msg(TOK, subject=token_subject("normal", song_of(key)))


async def test_the_service_shows_itself(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        info = json.loads((await gateway.nc.request("$SRV.INFO.heartmula", timeout=10)).data)
        shown = {endpoint["subject"]: endpoint["metadata"] for endpoint in info["endpoints"]}
        assert list(shown) == ["submit.*", "intake.*", "record.*.*"]
        answer, schema = await ask(gateway, SONG), json.loads(shown["submit.*"]["response_schema"])
        assert set(answer) <= set(schema["$defs"]["TakenBody"]["properties"])
        assert set(SONG) <= set(
            json.loads(shown["intake.*"]["request_schema"])["$defs"]["GenerateRequest"]["properties"]
        )

        for body in (b"{", b'{"lyrics": "la", "topk": 0}'):
            await ask(gateway, body)
        stats = json.loads((await gateway.nc.request("$SRV.STATS.heartmula", timeout=10)).data)
        submit = stats["endpoints"][0]
        assert (submit["num_requests"], submit["num_errors"]) == (3, 2)
        assert submit["last_error"].startswith("422: topk")
        assert submit["average_processing_time"] == submit["processing_time"] // 3
        await gateway.stop()
        with pytest.raises(nats.errors.NoRespondersError):
            await gateway.nc.request(SUBJECT, b"{}", timeout=10)


async def test_statistics_of_the_service_are_those_of_its_answers(nats_settings: Settings) -> None:
    nc = await connect(as_role(nats_settings, "gateway"), "test")
    tasks, both, came, longest = BackgroundTasks(), asyncio.Event(), 0, 0

    async def answer(request: Request) -> dict[str, str]:
        nonlocal came, longest
        began, came = time.perf_counter_ns(), came + 1
        if came == 2:
            both.set()
        await both.wait()  # one answer awaits the other request: they are handled at the same time
        longest = max(longest, time.perf_counter_ns() - began)
        if request.data:
            raise InvalidRequest("tags", "are\nünknown")
        return {}

    replies = ReplySubjects(as_role(nats_settings, "gateway"), Metrics().unanswered)
    service = NatsService(nc, ServiceConfig(name="test", version="1.0.0"), replies, tasks.spawn)
    await service.start([Endpoint("submit", "submit.*", answer, {"about": "a test"})])
    client = await nats.connect(nats_settings.nats_url)
    good, bad = await asyncio.gather(*(client.request(SUBJECT, body, timeout=10) for body in (b"", b"x")))
    assert good.headers is None
    assert (bad.headers or {})["Nats-Service-Error-Code"] == "422"
    assert (bad.headers or {})["Nats-Service-Error"] == "tags: are ?nknown"
    (shown,) = json.loads((await client.request("$SRV.STATS.test", timeout=10)).data)["endpoints"]
    assert (shown["num_requests"], shown["num_errors"]) == (2, 1)
    assert shown["processing_time"] >= longest
    assert shown["average_processing_time"] == shown["processing_time"] // 2
    await service.stop()
    await client.close()
    await nc.close()


async def test_a_nats_client_watches_its_song(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        subscription = await gateway.nc.subscribe(f"events.{TENANT}.>")  # what `nats sub` in docs/nats.md does
        await gateway.nc.flush()
        job_id = (await ask(gateway, SONG))["job_id"]
        await gateway.complete(job_id)
        kinds = []
        while "completed" not in kinds:
            message = await subscription.next_msg(timeout=10)
            event = json.loads(message.data)
            assert (event["specversion"], event["subject"]) == ("1.0", job_id)
            assert message.subject == f"events.{TENANT}.{job_id}.{event['data']['kind']}"
            kinds.append(event["data"]["kind"])
        assert kinds[0] == "queued"


async def test_a_tenant_at_its_limit_waits_and_holds_up_no_other(settings: Settings) -> None:
    keys = settings.data_dir / "keys.toml"
    keys.write_text(
        f'[[tenant]]\nname = "alice"\nkeys = ["{digest_of_key("a")}"]\nsongs_per_minute = 20\nburst = 1\n'
        f'[[tenant]]\nname = "bob"\nkeys = ["{digest_of_key("b")}"]\n'
    )
    async with running_gateway(replace(settings, api_keys=keys), settings.data_dir) as gateway:

        async def intake_is_empty() -> bool:
            return not (await gateway.js.stream_info(INTAKE)).state.messages

        order = await gateway.nc.subscribe("events.*.*.queued")
        await gateway.nc.flush()
        for tenant in ("alice", "alice", "bob"):
            ack = await gateway.js.publish(intake_subject(tenant), json.dumps(SONG).encode())
            assert ack.stream == INTAKE
        tenants = [(await order.next_msg(timeout=30)).subject.split(".")[1] for _ in range(3)]
        assert (sorted(tenants[:2]), tenants[2]) == (["alice", "bob"], "alice")
        with pytest.raises(NotFoundError):
            await gateway.js.get_msg(EVENTS, subject="events.*.*.refused")
        await eventually(intake_is_empty, "a request stays in the intake")
