"""Many listeners to one song: slow ones, those who leave at any moment, and what is left of them."""

import asyncio
import gc
import os
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server, Server
from services.gateway.api import audio_response, audio_stream
from services.gateway.auth.api_keys import Caller
from services.gateway.container import Container
from services.gateway.media import encodings, flac_stream, growing_songs
from services.gateway.server import GatewayServer
from shared.settings import Settings
from tests.integration.gateway_fixtures import eventually, in_process
from tests.integration.growing_song import GrowingSong
from tests.integration.test_gateway_stream import HEADER, Hearing, problem

RATE = 8000
PATIENCE = 60.0


class Service:
    """A gateway in this process, with a song that grows."""

    def __init__(self, gateway: Container, server: GatewayServer, base: str, song: GrowingSong) -> None:
        self.gateway, self.server, self.base, self.song = gateway, server, base, song
        self.url = f"{base}/generate/{song.job_id}/stream"

    async def connect(self, query: str = "", buffer: int = 4096) -> socket.socket:
        """Ask for the stream, and read nothing of it."""
        host, _, port = self.base.removeprefix("http://").partition(":")
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (host, int(port)))
        path = f"/generate/{self.song.job_id}/stream{query}"
        await loop.sock_sendall(client, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        return client

    async def listeners(self, count: int) -> None:
        """Wait until so many listen."""

        async def listening() -> bool:
            songs = self.gateway.growing_songs._songs.values()
            return sum(len(song.listeners) for song in songs) == count

        await eventually(listening, f"there are not {count} listeners")


@asynccontextmanager
async def service(settings: Settings) -> AsyncIterator[Service]:
    async with in_process(settings) as (gateway, server, base), asyncio.timeout(PATIENCE):
        job = (await gateway.submission.submit(Caller("local"), b'{"lyrics": "la"}')).job
        yield Service(gateway, server, base, GrowingSong(gateway.js, gateway.store, job.job_id, RATE))


async def test_listeners_who_do_not_read_cost_others_nothing_and_are_let_go(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_stream, "STALLED_SECONDS", 1.0)
    async with service(settings) as here, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        await here.song.window(400)  # more than the sockets hold
        stalled = [await here.connect(query) for query in ("", "?format=wav") for _ in range(10)]
        async with http.stream("GET", here.url) as answer:
            hearing = Hearing(answer)
            await hearing.up_to(len(here.song.stream))
            await here.listeners(1)  # who read, and has nothing to read for now
            await here.song.window(10)
            file = await here.song.finish(100)
            assert (await hearing.rest())[HEADER:] == file[HEADER:]

        async def alone() -> bool:
            return len(here.server.server_state.connections) == 1  # the one that may be used again

        await eventually(alone, "connections are left of clients that do not read")
        for client in stalled:
            client.close()


async def test_a_finished_song_that_nobody_reads_holds_no_connection(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_response, "_STALLED_SECONDS", 0.5)
    async with service(settings) as here:
        await here.song.window(800)
        await here.song.finish(100)
        client = await here.connect()

        async def connected(count: int) -> bool:
            return len(here.server.server_state.connections) == count

        await eventually(lambda: connected(1), "the client is not served")
        await eventually(lambda: connected(0), "the connection is left")
        client.close()


async def test_hundreds_who_come_and_go_leave_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "LINGER_SECONDS", 0.1)
    async with service(settings) as here:
        await here.song.window(10)

        async def visit(number: int) -> None:
            query = ("", "?format=mp3", "?from=1", "?from=3")[number % 4]
            client = await here.connect(query)
            if number % 3:
                await asyncio.get_running_loop().sock_recv(client, 1000)
            if number % 2:  # as a process that was killed, or whose machine was
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

        async def crowd() -> tuple[int, int, int]:
            for _ in range(10):
                await asyncio.gather(*(visit(number) for number in range(20)))

            async def forgotten() -> bool:
                return not (
                    here.gateway.growing_songs
                    or here.gateway.encodings
                    or here.gateway.broadcaster.subscriptions
                    or here.server.server_state.connections
                    or list((settings.data_dir / "tmp").iterdir())
                )

            await eventually(forgotten, "something is left of listeners who are gone")
            gc.collect()
            return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd")), tracemalloc.get_traced_memory()[0]

        await crowd()  # what is made once: threads, connections to the store
        tracemalloc.start()
        try:
            tasks, files, memory = await crowd()
            again_tasks, again_files, again_memory = await crowd()
        finally:
            tracemalloc.stop()
        assert again_tasks <= tasks + 5  # the gateway's own come and go
        assert again_files <= files + 5
        assert again_memory - memory < 300_000  # bytes; 200 visits


async def test_a_song_that_does_not_begin_is_refused_after_a_while(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_stream, "WAIT_SECONDS", 0.3)
    async with service(settings) as here, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        answer = await http.get(here.url)
        problem(answer, 409, "the song is queued")
        assert int(answer.headers["retry-after"]) > 0
        await here.song.window(4)
        problem(await http.get(here.url, headers={"Range": "bytes=1000000-"}), 409, "generating; 2.048 seconds of it")
        size = len(here.song.stream)
        clipped = await http.get(here.url, headers={"Range": "bytes=10-1000000"})
        assert (clipped.status_code, clipped.content) == (206, here.song.stream[10:])
        assert clipped.headers["content-range"] == f"bytes 10-{size - 1}/*"


async def test_a_stream_goes_on_when_the_store_is_back(settings: Settings, s3_server: S3Server) -> None:
    async with service(settings) as here, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        await here.song.window(800)  # more than the sockets hold
        async with http.stream("GET", here.url) as answer:
            hearing = Hearing(answer)
            await hearing.up_to(1)
            s3_server.kill()
            await s3_server.wait()
            reading = asyncio.create_task(hearing.up_to(len(here.song.stream)))
            await s3_server.start()
            assert await reading == here.song.stream


@pytest.mark.parametrize("gone", ["nats", "s3"])
async def test_a_stream_is_cut_where_a_server_stays_away(
    settings: Settings, nats_server: NatsServer, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    for module in (growing_songs, flac_stream):
        monkeypatch.setattr(module, "AWAY_SECONDS", 0.5)
    async with service(settings) as here, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        await here.song.window(800)
        async with http.stream("GET", here.url) as answer:
            hearing = Hearing(answer)
            await hearing.up_to(1)
            server: Server = nats_server if gone == "nats" else s3_server
            server.kill()
            await server.wait()
            with pytest.raises(httpx.RemoteProtocolError):
                await hearing.rest()
        await server.start()


async def test_a_connection_is_used_again_after_a_range_of_a_song_that_grows(settings: Settings) -> None:
    async with service(settings) as here:
        await here.song.window(10)
        path = here.url.removeprefix(here.base)
        host, _, port = here.base.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for first in (100, 200):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nRange: bytes={first}-{first + 49}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 206 ")
            assert await reader.readexactly(50) == here.song.stream[first : first + 50]
            await here.listeners(0)

            async def served() -> bool:
                return not here.gateway.growing_songs and not here.server.server_state.tasks

            await eventually(served, "the response does not end")
        writer.close()


async def test_the_end_of_the_process_cuts_streams_at_once(settings: Settings) -> None:
    async with service(settings) as here, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        await here.song.window(800)
        paused = [await here.connect(query) for query in ("", "?format=wav")]
        await here.listeners(2)
        async with http.stream("GET", here.url) as answer:
            hearing = Hearing(answer)
            await hearing.up_to(len(here.song.stream))
            here.server.stop()
            with pytest.raises(httpx.RemoteProtocolError):
                await hearing.rest()

        async def gone() -> bool:
            return not here.server.server_state.connections

        await eventually(gone, "connections are left")
        for client in paused:
            client.close()
