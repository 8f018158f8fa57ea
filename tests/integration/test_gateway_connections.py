"""Clients that connect and send nothing, half of a request, or send too slowly: they do not block other clients."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import websockets

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.api import http_protocol
from shared.settings import Settings
from tests.integration.gateway_fixtures import (
    SONG,
    RunningGateway,
    Watcher,
    eventually,
    fresh_settings,
    in_process,
    running_gateway,
)

FILES = (64, 328)  # of which 128 are not for connections
ROOM = 200
CONNECTIONS = 600
BODY = json.dumps(SONG).encode()
POST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def open_connections(base: str, count: int, sent: bytes) -> AsyncIterator[list[Streams]]:
    """Open `count` connections and send the same bytes on each."""
    host, _, port = base.removeprefix("http://").partition(":")
    found: list[Streams] = []
    try:
        for _ in range(count):
            found.append(await asyncio.wait_for(asyncio.open_connection(host, int(port)), 10))
            found[-1][1].write(sent)
        yield found
    finally:
        for _, writer in found:
            writer.close()


def limits(pid: int) -> list[str]:
    text = Path(f"/proc/{pid}/limits").read_text()
    return next(line for line in text.splitlines() if line.startswith("Max open files")).split()[3:5]


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("connections")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder, files=FILES) as gateway:
        yield gateway


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HTTP/1.1\r\nHost: loc", POST + b"1000\r\n\r\n{", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"],
    ids=["nothing", "half a head", "half a body", "an answered request"],
)
async def test_more_idle_connections_than_may_be_open_keep_no_client_out(gateway: RunningGateway, sent: bytes) -> None:
    assert limits(gateway.process.pid) == [str(FILES[1])] * 2  # raised at the start
    job_id = await gateway.submit()
    async with gateway.watch(job_id) as watcher, gateway.http.stream("GET", f"/generate/{job_id}/events") as stream:
        assert (await watcher.frame())["type"] == "snapshot"
        lines = stream.aiter_lines()
        await anext(lines)
        async with open_connections(gateway.base, CONNECTIONS, sent):
            for _ in range(3):
                async with httpx.AsyncClient(base_url=gateway.base, trust_env=False, timeout=10) as newcomer:
                    assert (await newcomer.get("/livez")).status_code == 200
                    assert (await newcomer.post("/generate", json=SONG)).status_code == 202
            assert len(os.listdir(f"/proc/{gateway.process.pid}/fd")) < FILES[1]
            await gateway.http.delete(f"/generate/{job_id}")  # who followed a song, follows it still
            assert [frame["type"] for frame in (await watcher.rest())[0]][-1] == "heartmula.song.cancelled"
            assert "event: heartmula.song.cancelled" in [line async for line in lines]
    log = gateway.log.read_text()
    assert "as many as may" in log
    assert "Too many open files" not in log
    assert "Traceback" not in log


async def test_connections_beyond_the_limit_are_refused_while_all_others_are_busy(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    ask = f"GET /generate/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    async with open_connections(gateway.base, ROOM + 50, ask) as clients:
        begun = await asyncio.gather(*(reader.readline() for reader, _ in clients), return_exceptions=True)
        served = [line for line in begun if isinstance(line, bytes) and b" 200 " in line]
        assert ROOM - 10 <= len(served) <= ROOM
        for line in begun:
            assert isinstance(line, ConnectionError | bytes)
            assert isinstance(line, ConnectionError) or line[9:12] in (b"", b"200", b"503")

    async def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return (await gateway.http.get("/livez")).status_code == 200
        return False

    await eventually(answers, "it does not recover")


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time limits of a second instead of twenty."""
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "STILL_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(http_protocol, name, getattr(http_protocol, name) / 20)


async def answer(streams: Streams) -> tuple[bytes, bytes]:
    """Read to the end of the connection; returns the status line and all that follows."""
    text = await asyncio.wait_for(streams[0].read(), 30)
    line, _, rest = text.partition(b"\r\n")
    return line, rest


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: loc", POST + b"1000\r\n\r\n", POST + b"1000\r\n\r\n{"])
async def test_a_request_that_does_not_arrive_is_answered_408(
    short_timeouts: None, settings: Settings, sent: bytes
) -> None:
    async with in_process(settings) as (_, server, base), open_connections(base, 1, sent) as clients:
        line, rest = await answer(clients[0])
        assert line.split()[1] == b"408"
        assert json.loads(rest.partition(b"\r\n\r\n")[2])["status"] == 408

        async def gone() -> bool:
            return not server.server_state.connections and not server.server_state.tasks

        await eventually(gone, "something is left of it")


async def test_a_head_that_arrives_too_slowly_or_never_ends_is_refused(
    short_timeouts: None, settings: Settings
) -> None:
    async with in_process(settings) as (_, _, base):
        async with open_connections(base, 1, b"GET / HTTP/1.1\r\n") as clients:
            reading = asyncio.create_task(answer(clients[0]))
            while not reading.done():
                clients[0][1].write(b"x: y\r\n")
                await asyncio.sleep(0.1)
            assert reading.result()[0].split()[1] == b"408"
        async with open_connections(base, 1, b"GET / HTTP/1.1\r\n") as clients:
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    clients[0][1].write(b"x: " + b"y" * 1000 + b"\r\n")
                    await clients[0][1].drain()
            with contextlib.suppress(ConnectionError):
                assert (await answer(clients[0]))[0].split()[1] == b"431"


async def test_a_slow_upload_that_progresses_is_accepted(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload takes longer than a body may stand still."""
    monkeypatch.setattr(http_protocol, "STILL_SECONDS", 2.0)
    async with in_process(settings) as (_, _, base), open_connections(base, 1, b"") as clients:
        reader, writer = clients[0]
        body = BODY + b" " * (40 - len(BODY) % 40)
        writer.write(POST + str(len(body)).encode() + b"\r\nConnection: close\r\n\r\n")
        step = len(body) // 10
        for at in range(0, len(body), step):
            writer.write(body[at : at + step])
            await asyncio.sleep(http_protocol.STILL_SECONDS / 8)
        assert (await answer((reader, writer)))[0].split()[1] == b"202"


async def test_a_body_that_continues_after_its_refusal_is_cut_off(short_timeouts: None, settings: Settings) -> None:
    async with in_process(settings) as (_, _, base), open_connections(base, 1, POST + b"100000000\r\n\r\n") as clients:
        reading = asyncio.create_task(answer(clients[0]))
        while not reading.done():
            clients[0][1].write(b"x" * 100)
            await asyncio.sleep(0.1)
        with contextlib.suppress(ConnectionError):
            assert reading.result()[0].split()[1] == b"413"


async def test_streams_websockets_and_kept_connections_outlive_every_time_limit(
    short_timeouts: None, settings: Settings
) -> None:
    async with in_process(settings) as (_, _, base), httpx.AsyncClient(base_url=base, trust_env=False) as http:
        job_id = (await http.post("/generate", json=SONG)).json()["job_id"]
        url = f"{base.replace('http', 'ws', 1)}/generate/{job_id}/events"
        async with (
            websockets.connect(url, proxy=None) as socket,
            http.stream("GET", f"/generate/{job_id}/events") as events,
        ):
            watcher, lines = Watcher(socket), events.aiter_lines()
            assert (await watcher.frame())["type"] == "snapshot"
            while not (await anext(lines)).startswith("data"):
                pass
            await http.get("/livez")
            pool = http._transport._pool  # type: ignore[attr-defined]
            before = pool.connections
            for _ in range(8):  # longer than any limit but that of a connection which is being closed
                await asyncio.sleep(http_protocol.BODY_SECONDS / 7)
                assert (await http.get("/livez")).status_code == 200
            assert pool.connections == before
            assert (await http.delete(f"/generate/{job_id}")).status_code == 200
            assert (await watcher.rest())[1] == 1000
            assert "event: heartmula.song.cancelled" in [line async for line in lines]


async def test_requests_that_are_sent_ahead_are_answered_in_turn(short_timeouts: None, settings: Settings) -> None:
    """Half a request that follows a stream's request does not disturb the stream."""
    async with in_process(settings) as (_, _, base), httpx.AsyncClient(base_url=base, trust_env=False) as http:
        job_id = (await http.post("/generate", json=SONG)).json()["job_id"]
        ask = f"GET /generate/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        async with open_connections(base, 1, ask + b"GET /li") as clients:
            reader, writer = clients[0]
            await reader.readuntil(b"snapshot")
            await asyncio.sleep(1.5 * http_protocol.HEAD_SECONDS)
            assert (await http.delete(f"/generate/{job_id}")).status_code == 200
            await reader.readuntil(b"cancelled")
            writer.write(b"vez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b'{"ok":true}' in (await answer(clients[0]))[1]
