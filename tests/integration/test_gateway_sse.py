"""A song's events as server-sent events."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.api import sse as event_stream
from services.gateway.auth.api_keys import Caller
from shared.nats.subjects import event_subject
from shared.schema.event import Progress, Queued, cloud_event
from shared.settings import Settings
from tests.integration.flow import PATIENCE
from tests.integration.gateway_fixtures import RunningGateway, eventually, fresh_settings, in_process, running_gateway

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-sse")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


class Reader:
    """Reads an event stream as a browser does."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.aiter_lines()

    async def event(self) -> dict[str, str] | None:
        """The fields of the next event, a comment under the empty name; None at the end of the stream."""
        found: dict[str, str] = {}
        async with asyncio.timeout(PATIENCE):
            async for line in self._lines:
                if not line and found.keys() - {"retry"}:
                    return found
                if line:
                    name, _, value = line.partition(":")
                    found[name] = value.removeprefix(" ")
        return None

    async def frame(self) -> dict[str, Any]:
        """Data of the next event; checks its other fields."""
        event = await self.event()
        assert event is not None, "the stream has ended"
        data: dict[str, Any] = json.loads(event["data"])
        assert (event["id"], event["event"]) == (data["id"], data["type"])
        return data

    async def rest(self) -> list[dict[str, Any]]:
        """Data of all events up to the end of the stream."""
        return [json.loads(event["data"]) async for event in self._events()]

    async def _events(self) -> AsyncIterator[dict[str, str]]:
        while event := await self.event():
            yield event


@asynccontextmanager
async def listen(gateway: RunningGateway, job_id: str, query: str = "", **headers: str) -> AsyncIterator[Reader]:
    async with gateway.http.stream("GET", f"/generate/{job_id}/events{query}", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        yield Reader(answer)


async def test_a_client_gets_the_same_events_as_over_a_websocket(gateway: RunningGateway) -> None:
    job_id = await gateway.submit(title="Ü", seed=3)
    async with listen(gateway, job_id) as reader, gateway.watch(job_id) as watcher:
        assert await reader.frame() == await watcher.frame()
        await gateway.move_to(job_id, "generating")
        await gateway.stage(job_id)
        await gateway.progress(job_id, 40)
        await gateway.progress(job_id, 10)
        await gateway.complete(job_id)
        frames, _ = await watcher.rest()
        assert await reader.rest() == frames
        assert frames[-1]["type"] == "heartmula.song.completed"


@pytest.mark.parametrize("how", ["header", "query", "both"])
async def test_a_client_that_comes_back_gets_what_it_missed_once(gateway: RunningGateway, how: str) -> None:
    job_id = await gateway.submit()
    async with listen(gateway, job_id) as reader:
        first = (await reader.frame())["id"]
    await gateway.move_to(job_id, "generating")
    for percent in (10, 20):
        await gateway.progress(job_id, percent)
    headers = {} if how == "query" else {"Last-Event-ID": first}
    query = {"header": "", "query": f"?after={first}", "both": "?after=0"}[how]  # the header is the newer one
    async with listen(gateway, job_id, query, **headers) as reader:
        assert (await reader.frame())["progress"] == 20
        assert [(await reader.frame())["data"]["done"] for _ in range(2)] == [10, 20]
        await gateway.complete(job_id)
        assert [frame["type"] for frame in await reader.rest()] == ["heartmula.song.completed"]


async def test_a_browser_that_knows_the_end_is_answered_not_to_reconnect(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    await gateway.complete(job_id)
    async with listen(gateway, job_id, "?after=0") as reader:
        frames = await reader.rest()
    assert [frame["type"].split(".")[-1] for frame in frames] == ["snapshot", "queued", "completed"]
    path, last = f"/generate/{job_id}/events", frames[-1]["id"]
    assert (await gateway.http.get(path, headers={"Last-Event-ID": last})).status_code == 204
    async with listen(gateway, job_id, **{"Last-Event-ID": frames[1]["id"]}) as reader:
        assert [frame["type"].split(".")[-1] for frame in await reader.rest()] == ["snapshot", "completed"]


@pytest.mark.parametrize(
    ("path", "headers", "status", "kind"),
    [
        (f"/generate/{UNKNOWN}/events", {}, 404, "unknown-job"),
        ("/generate/a.b/events", {}, 404, "unknown-job"),
        ("/generate/{}/events?after=x", {}, 422, "invalid-request"),
        ("/generate/{}/events", {"Last-Event-ID": "-1"}, 422, "invalid-request"),
    ],
)
async def test_what_cannot_be_followed_is_refused_as_everywhere(
    gateway: RunningGateway, path: str, headers: dict[str, str], status: int, kind: str
) -> None:
    answer = await gateway.http.get(path.format(await gateway.submit()), headers=headers)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == f"/problems/{kind}"


async def test_a_stopped_gateway_ends_the_stream_and_itself_at_once(gateway: RunningGateway) -> None:
    async with running_gateway(gateway.settings, gateway.log.parent) as second:
        job_id = await gateway.submit()
        async with listen(second, job_id) as reader:
            await reader.frame()
            second.process.send_signal(signal.SIGTERM)
            assert await reader.rest() == []
        assert await second.process.wait() == 0
    assert "Cancel" not in gateway.log.read_text()  # uvicorn's word for answers that it waited for in vain


async def test_pings_come_while_nothing_happens(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "PING_SECONDS", 0.05)
    async with in_process(settings) as (gateway, _, base), httpx.AsyncClient(trust_env=False) as http:
        job_id = (await gateway.submission.submit(Caller("local"), b'{"lyrics": "la"}')).job.job_id
        async with http.stream("GET", f"{base}/generate/{job_id}/events") as answer:
            reader = Reader(answer)
            await reader.frame()
            assert [await reader.event() for _ in range(3)] == [{"": "ping"}] * 3


async def test_a_client_that_does_not_read_is_disconnected(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "SEND_SECONDS", 0.2)
    async with in_process(settings) as (gateway, _, base):
        job_id = (await gateway.submission.submit(Caller("local"), b'{"lyrics": "la"}')).job.job_id
        _reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(base).port, limit=1024)
        writer.write(f"GET /generate/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

        async def listening() -> bool:
            return gateway.broadcaster.subscriptions == 1

        await eventually(listening, "the stream did not begin")
        event = cloud_event(Progress(job_id=job_id, status="generating", progress=1, done=1, total=100), "1")
        large = msgspec.json.encode(msgspec.structs.replace(event, source="x" * 50_000))  # buffers are megabytes
        for _ in range(600):
            if not gateway.broadcaster.subscriptions:
                break
            await gateway.js.publish(event_subject("local", job_id, "progress"), large)

        async def let_go() -> bool:
            return gateway.broadcaster.subscriptions == 0

        await eventually(let_go, "the gateway still waits for a client that does not read")
        writer.transport.abort()


async def test_clients_that_vanish_leave_nothing_behind(settings: Settings) -> None:
    before = asyncio.all_tasks()
    async with in_process(settings) as (gateway, _, base):
        job_id = (await gateway.submission.submit(Caller("local"), b'{"lyrics": "la"}')).job.job_id
        port = urlsplit(base).port
        idle = len(asyncio.all_tasks())
        request = f"GET /generate/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()

        async def arrive() -> asyncio.StreamWriter:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await reader.readuntil(b"event: snapshot")
            return writer

        for _ in range(4):
            clients = await asyncio.gather(*(arrive() for _ in range(50)))
            assert gateway.broadcaster.subscriptions == 50
            for client in clients:
                client.transport.abort()
            await gateway.events.publish("local", Queued(job_id=job_id, status="queued", progress=0))

            async def forgotten() -> bool:
                # The gateway's own tasks come and go; one left behind by every client would be 50.
                return gateway.broadcaster.subscriptions == 0 and len(asyncio.all_tasks()) < idle + 25

            await eventually(forgotten, "listeners or tasks are left of 50 clients")
    assert asyncio.all_tasks() <= before
