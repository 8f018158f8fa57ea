"""Idempotency: a request that is repeated with its key makes one song, whatever happened to the first request."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from nats.js.api import RawStreamMsg
from nats.js.errors import APIError, NotFoundError

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.submission.idempotency import digest_of, song_of
from services.gateway.submission.rollback import roll_back
from shared.nats.subjects import JOBS, TENANT, TOK, submit_subject, token_subject
from shared.schema.job import Job, TokenJob
from shared.schema.request import GenerateRequest
from tests.integration.gateway_fixtures import SONG, RunningGateway, fresh_settings, running_gateway


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-repeat")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


@pytest.fixture
def key() -> str:
    return str(uuid.uuid4())


async def post(gateway: RunningGateway, key: str, **values: object) -> httpx.Response:
    return await gateway.http.post("/generate", json=SONG | values, headers={"Idempotency-Key": key})


async def messages(gateway: RunningGateway) -> int:
    return (await gateway.js.stream_info(TOK)).state.messages


async def test_the_same_request_gets_the_same_song_in_its_present_state(gateway: RunningGateway, key: str) -> None:
    first = await post(gateway, key)
    assert first.status_code == 202
    before = await messages(gateway)
    again = await post(gateway, key)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["location"] == first.headers["location"]
    job_id = first.json()["job_id"]
    seed = (await gateway.job(job_id)).request.seed
    await gateway.move_to(job_id, "generating")
    assert (await post(gateway, key)).json()["status"] == "generating"
    await gateway.complete(job_id)
    answer = (await post(gateway, key)).json()
    assert (answer["job_id"], answer["status"]) == (job_id, "completed")
    assert (await gateway.job(job_id)).request.seed == seed
    assert await messages(gateway) == before
    assert (await post(gateway, key + "x")).json()["job_id"] != job_id


async def test_another_request_under_the_same_key_is_refused(gateway: RunningGateway, key: str) -> None:
    job_id = (await post(gateway, key)).json()["job_id"]
    before = await messages(gateway)
    for values in ({"lyrics": "other"}, {"seed": 1}, {"priority": "high"}):
        answer = await post(gateway, key, **values)
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] == "/problems/idempotency-mismatch"
    assert await messages(gateway) == before
    # What says the same in other words is the same request.
    content = json.dumps(SONG | {"temperature": 1, "format": "flac"}, indent=2)
    headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
    answer = await gateway.http.post("/generate", content=content, headers=headers)
    assert answer.json()["job_id"] == job_id


@pytest.mark.parametrize("key", [b"", b"a b", b"x" * 256, b"\xc3\xa9", b"a\tb"])
async def test_a_key_that_is_none_is_refused(gateway: RunningGateway, key: bytes) -> None:
    answer = await gateway.http.post("/generate", json=SONG, headers={b"Idempotency-Key": key})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request")
    assert "255" in answer.json()["detail"]


async def test_a_key_may_be_long_and_odd(gateway: RunningGateway) -> None:
    key = "".join(map(chr, range(0x21, 0x7F))) + "x" * 161
    first, again = await post(gateway, key), await post(gateway, key)
    assert first.status_code == 202
    assert again.json()["job_id"] == first.json()["job_id"]


async def test_a_message_that_a_crash_swallowed_is_published_by_the_repeat(gateway: RunningGateway, key: str) -> None:
    asked = msgspec.convert(SONG, GenerateRequest)
    job = Job(
        job_id=song_of(key),
        tenant=TENANT,
        request=msgspec.structs.replace(asked, seed=9),
        created_at=time.time(),
        digest=digest_of(asked),
    )
    await gateway.jobs.create(job)
    bucket, subject = f"KV_{JOBS}", f"$KV.{JOBS}.{TENANT}.{job.job_id}"
    revision = (await gateway.js.get_msg(bucket, subject=subject)).seq or 0
    answer = await post(gateway, key)
    assert (answer.status_code, answer.json()["job_id"]) == (202, job.job_id)
    message = await gateway.js.get_msg(TOK, subject=token_subject("normal", job.job_id))
    assert msgspec.json.decode(message.data or b"", type=TokenJob) == TokenJob(job_id=job.job_id, tenant=TENANT)
    assert await gateway.job(job.job_id) == job
    # It is written once more, so that a first request that still runs does not roll back a song that was answered.
    assert ((await gateway.js.get_msg(bucket, subject=subject)).seq or 0) > revision


async def test_many_at_once_on_two_gateways_make_one_song(gateway: RunningGateway) -> None:
    async with running_gateway(gateway.settings, gateway.log.parent) as second:
        for _ in range(5):
            key, before = str(uuid.uuid4()), await messages(gateway)
            answers = await asyncio.gather(*(post(one, key) for one in (gateway, second) * 5))
            assert {answer.status_code for answer in answers} == {202}
            assert len({answer.json()["job_id"] for answer in answers}) == 1
            assert await messages(gateway) == before + 1
            await gateway.job(answers[0].json()["job_id"])


async def test_nats_clients_repeat_with_a_message_id(gateway: RunningGateway, key: str) -> None:
    subject, data, headers = submit_subject(TENANT), json.dumps(SONG).encode(), {"Nats-Msg-Id": key}

    async def ask(data: bytes) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((await gateway.nc.request(subject, data, timeout=10, headers=headers)).data)
        return found

    first, again = await ask(data), await ask(data)
    assert (first["duplicate"], again["duplicate"]) == (False, True)
    assert first | {"duplicate": True} == again
    ack = await gateway.js.publish(subject, data, headers=headers)
    assert (ack.duplicate, ack.seq) == (True, first["seq"])
    assert (await post(gateway, key)).json()["job_id"] == first["job_id"]  # the same key, whichever way
    error = (await ask(json.dumps(SONG | {"seed": 1}).encode()))["error"]
    assert (error["code"], error["err_code"]) == (422, 20006)
    with pytest.raises(APIError):
        await gateway.js.publish(subject, data, headers={"Nats-Msg-Id": "a b"})


async def created(gateway: RunningGateway, key: str) -> Job:
    """Create the record of a song whose message was not published."""
    request = GenerateRequest(lyrics="la", max_duration_ms=80, seed=1)
    job = Job(job_id=song_of(key), tenant=TENANT, request=request, created_at=time.time(), digest="d")
    await gateway.jobs.create(job)
    return job


async def test_a_song_that_no_client_was_answered_with_is_rolled_back(gateway: RunningGateway, key: str) -> None:
    job = await created(gateway, key)
    await roll_back(gateway.js, gateway.store, job)
    assert await gateway.jobs.get(job.job_id) is None
    await roll_back(gateway.js, gateway.store, job)
    await gateway.jobs.create(job)  # nothing is left that would be in the way


async def test_a_song_that_a_duplicate_was_answered_with_is_never_rolled_back(
    gateway: RunningGateway, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await created(gateway, key)  # the record is another request's, which has yet to publish
    await roll_back(gateway.js, gateway.store, msgspec.structs.replace(other, created_at=1.0))
    assert await gateway.job(other.job_id) == other

    waiting = await created(gateway, key + "2")
    await gateway.js.publish(token_subject("normal", waiting.job_id), b"{}")
    await roll_back(gateway.js, gateway.store, waiting)
    assert await gateway.job(waiting.job_id) == waiting

    # A duplicate publishes and is answered, and a worker removes the message, all between two reads.
    answered = await created(gateway, key + "3")
    read = gateway.js.get_msg

    async def late(stream: str, **wanted: Any) -> RawStreamMsg:
        if stream == f"KV_{JOBS}":
            return await read(stream, **wanted)
        await gateway.jobs.update(answered.job_id, TENANT, msgspec.structs.replace)
        raise NotFoundError

    monkeypatch.setattr(gateway.js, "get_msg", late)
    await roll_back(gateway.js, gateway.store, answered)
    monkeypatch.undo()
    assert await gateway.job(answered.job_id) == answered
