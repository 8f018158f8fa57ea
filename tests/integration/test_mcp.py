"""MCP by the package's own client: on standard input and output, and at the gateway's address, with the same tools."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import anyio
import httpx2
import pytest
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, ResourceLink, TextContent, TextResourceContents

from deploy.local.servers.embedded import NatsServer, S3Server
from tests.integration.flow import PATIENCE, Flow, open_flow
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, running_gateway
from tests.unit.recordings import file_of, music

Way = Literal["stdio", "http", "http of 2025"]
WAYS: tuple[Way, ...] = ("stdio", "http", "http of 2025")
TOOLS = {
    *("write_song", "extend_song", "watch_song", "show_song", "list_songs", "cancel_song"),
    *("upload_recording", "show_recording"),
}
SONG = {"lyrics": "[Verse]\nla la la", "tags": "pop,piano", "max_duration_ms": 4000}
UNKNOWN = "00000000-0000-4000-8000-000000000000"


class Agent:
    """A client that is connected to a server."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.reports: list[tuple[float, str]] = []  # progress of the latest call

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Call a tool; returns its structured answer, which its text says too."""
        result = await self.result(tool, **arguments)
        assert not result.is_error, result.content
        text = result.content[0]
        assert isinstance(text, TextContent)
        assert json.loads(text.text) == result.structured_content
        return dict(result.structured_content or {})

    async def refused(self, tool: str, **arguments: Any) -> str:
        """Call a tool that refuses it; returns its words."""
        result = await self.result(tool, **arguments)
        assert result.is_error, result.content
        (text,) = result.content
        assert isinstance(text, TextContent)
        return text.text

    async def result(self, tool: str, **arguments: Any) -> CallToolResult:
        """Call a tool."""
        self.reports = []

        async def report(progress: float, total: float | None, message: str | None) -> None:
            assert total == 100
            self.reports.append((progress, message or ""))

        return await self.client.call_tool(tool, arguments, progress_callback=report)

    async def read(self, uri: str) -> str:
        """Read a resource."""
        (content,) = (await self.client.read_resource(uri)).contents
        assert isinstance(content, TextResourceContents)
        return content.text


@asynccontextmanager
async def agent(base: str, way: Way = "http", key: str = "") -> AsyncIterator[Agent]:
    """An agent's client, connected."""
    if way == "stdio":
        env = {"HEARTMULA_URL": base, "PATH": os.environ["PATH"]} | ({"HEARTMULA_API_KEY": key} if key else {})
        command = StdioServerParameters(command=sys.executable, args=["-m", "heartmula_client", "mcp"], env=env)
        async with Client(command, read_timeout_seconds=PATIENCE) as client:
            yield Agent(client)
        return
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx2.AsyncClient(headers=headers, timeout=PATIENCE, trust_env=False) as http:
        mode = "auto" if way == "http" else "legacy"
        transport = streamable_http_client(f"{base}/mcp", http_client=http)
        async with Client(transport, mode=mode, read_timeout_seconds=PATIENCE) as client:
            yield Agent(client)


@asynccontextmanager
async def files() -> AsyncIterator[tuple[str, list[str]]]:
    """A web server with a recording and with answers that are none; its address, and the paths that were asked for."""
    flac, asked = file_of("flac", music(2)), list[str]()
    answers = {
        "/song.flac": (b"200 OK", b"", flac),
        "/moved": (b"302 Found", b"Location: /song.flac\r\n", b""),
        "/round": (b"302 Found", b"Location: /round\r\n", b""),
        "/disguised": (b"302 Found", b"Location: http://0x7f.1/song.flac\r\n", b""),
        "/endless": (b"302 Found", b"Location: %s\r\n" % (b"x" * 65_530), b""),
        "/file": (b"302 Found", b"Location: file:///etc/hosts\r\n", b""),
        "/page": (b"200 OK", b"Content-Type: text/html\r\n", b"<html>no audio</html>"),
        "/zip": (b"200 OK", b"Content-Encoding: gzip\r\n", flac),
        "/large": (b"200 OK", b"", bytes(3_000_000)),
    }

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(head.split()[1])
        status, headers, body = answers.get(asked[-1], (b"404 Not Found", b"", b""))
        length = b"Content-Length: %d\r\n" % len(body)
        writer.write(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\n" + headers + length + b"\r\n" + body)
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    server.close()


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    """A gateway that may fetch recordings from this machine."""
    folder = tmp_path_factory.mktemp("mcp")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with running_gateway(settings, folder, webhook_private=True, engine="trivial", recording_mb=2) as gateway:
        yield gateway


@pytest.fixture(scope="module")
async def local(gateway: RunningGateway) -> AsyncIterator[Agent]:
    """An agent with a server of its own, on standard input and output. To start one takes seconds."""
    found: asyncio.Future[Agent] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def connect() -> None:  # the client has to be closed by the task that opened it
        async with agent(gateway.base, "stdio") as user:
            found.set_result(user)
            await over.wait()

    task = asyncio.create_task(connect())
    yield await found
    over.set()
    await task


@asynccontextmanager
async def connected(way: Way, gateway: RunningGateway, local: Agent) -> AsyncIterator[Agent]:
    """An agent for a test that is run in several ways."""
    if way == "stdio":
        yield local
        return
    async with agent(gateway.base, way) as user:
        yield user


@pytest.fixture(scope="module")
async def flow(gateway: RunningGateway) -> AsyncIterator[Flow]:
    """Workers for that gateway."""
    async with open_flow(gateway.settings, "tokenizer", "codec") as flow:
        yield flow


async def test_a_repeated_call_with_a_key_makes_no_second_song(gateway: RunningGateway, local: Agent) -> None:
    async with agent(gateway.base) as user:
        first = await user.call("write_song", **SONG, idempotency_key="verse-1")
        assert (await local.call("write_song", **SONG, idempotency_key="verse-1"))["job_id"] == first["job_id"]
        assert (await user.call("write_song", **SONG))["job_id"] != first["job_id"]
        assert "another request" in await user.refused("write_song", lyrics="la", idempotency_key="verse-1")


@pytest.mark.parametrize("way", WAYS)
async def test_what_cannot_be_done_is_said_in_words(gateway: RunningGateway, local: Agent, way: Way) -> None:
    async with connected(way, gateway, local) as user:
        words = await user.refused("write_song", lyrics="la", max_duration_ms=9_000_000)
        assert "max_duration_ms: must be at most 3600000" in words
        words = await user.refused("write_song", words="la")
        assert words.startswith("words: no argument of write_song; it has lyrics, tags, max_duration_ms")
        assert "max_duration_ms: Input should be a valid integer" in await user.refused(
            "write_song", lyrics="la", max_duration_ms="long"
        )
        assert "give either job_id or recording_id" in await user.refused("extend_song", lyrics="la")
        assert "recording has none" in await user.refused("extend_song", recording_id=UNKNOWN)
        for tool in ("watch_song", "show_song", "cancel_song"):
            assert "no song has this id" in await user.refused(tool, job_id=UNKNOWN)
        assert "no recording has this id" in await user.refused("show_recording", recording_id=UNKNOWN)
        assert "cursor is not one" in await user.refused("list_songs", cursor="?")
        assert "parent has to be" in await user.refused("list_songs", parent="*")


async def test_a_service_that_is_away_is_said_in_words() -> None:
    async with agent("http://127.0.0.1:1", "stdio") as user:
        assert {tool.name for tool in (await user.client.list_tools()).tools} == TOOLS
        assert "no answer from http://127.0.0.1:1" in await user.refused("list_songs")


@pytest.mark.parametrize("way", ["stdio", "http"])
async def test_songs_without_words_and_for_later(gateway: RunningGateway, local: Agent, way: Way) -> None:
    async with connected(way, gateway, local) as user:
        later = f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}"
        song = await user.call("write_song", tags="jazz", instrumental=True, not_before=later)
        assert song["not_before"].startswith(later[:19])
        shown = await user.call("watch_song", job_id=song["job_id"], wait_seconds=0.1)
        assert (shown["status"], shown["not_before"]) == ("queued", song["not_before"])
        assert user.reports[0][1] == f"waits until {song['not_before']}"
        assert (await user.call("show_song", job_id=song["job_id"]))["request"]["instrumental"]
        assert "no words" in await user.refused("write_song", lyrics="la", instrumental=True)
        assert "not_before: " in await user.refused("write_song", lyrics="la", not_before="tomorrow")


async def test_a_cancelled_watch_leaves_the_song(local: Agent) -> None:
    job_id = (await local.call("write_song", **SONG))["job_id"]
    assert not (await local.call("watch_song", job_id=job_id, wait_seconds=0.1))["ended"]
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: local.result("watch_song", job_id=job_id))
        while not local.reports:
            await asyncio.sleep(0.05)
        group.cancel_scope.cancel()
    assert (await local.call("show_song", job_id=job_id))["status"] == "queued"
    assert (await local.call("cancel_song", job_id=job_id))["status"] == "cancelled"
    assert (await local.call("watch_song", job_id=job_id))["ended"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_song_from_the_request_to_its_audio(
    gateway: RunningGateway, local: Agent, flow: Flow, way: Way
) -> None:
    async with connected(way, gateway, local) as user:
        assert {tool.name for tool in (await user.client.list_tools()).tools} == TOOLS
        information = user.client.server_info
        assert information is not None
        assert information.version == version("heartmula-client")
        written = await user.call("write_song", **SONG, title="Hello", seed=7, variants=2)
        assert written["status"] == "queued"
        assert written["variants"][0] == written["job_id"]
        result = await user.result("watch_song", job_id=written["job_id"])
        song = result.structured_content or {}
        assert (song["status"], song["ended"], song["name"]) == ("completed", True, "Hello")
        progress = [percent for percent, _ in user.reports]
        assert progress == sorted(set(progress))
        assert (progress[-1], user.reports[-1][1]) == (100, "completed")
        (link,) = [content for content in result.content if isinstance(content, ResourceLink)]
        assert (str(link.uri), link.mime_type) == (song["result_url"], "audio/flac")
        assert (await gateway.http.get(song["result_url"])).content.startswith(b"fLaC")
        assert (await gateway.http.get(written["stream_url"])).content.startswith(b"fLaC")

        longer = await user.call("extend_song", job_id=song["job_id"], at_ms=2000, max_duration_ms=5000, min_new_ms=0)
        await user.call("watch_song", job_id=longer["job_id"])
        shown = await user.call("show_song", job_id=longer["job_id"])
        assert (shown["status"], shown["request"]["lyrics"]) == ("completed", SONG["lyrics"])
        assert (shown["parent"]["job_id"], shown["parent"]["at_ms"]) == (song["job_id"], 2000)
        listed = await user.call("list_songs", parent=song["job_id"])
        assert [each["job_id"] for each in listed["songs"]] == [longer["job_id"]]

        uri = f"heartmula://songs/{song['job_id']}"
        resources = {str(each.uri): each.name for each in (await user.client.list_resources()).resources}
        assert (resources[uri], resources[f"{uri}/lyrics"]) == ("Hello", "Hello: lyrics")
        assert await user.read(f"{uri}/lyrics") == SONG["lyrics"]
        described = json.loads(await user.read(uri))
        assert (described["request"]["seed"], described["result_url"]) == (7, song["result_url"])
        with pytest.raises(MCPError, match="no song has this id"):
            await user.read(f"heartmula://songs/{UNKNOWN}/lyrics")


async def test_what_is_fetched_has_to_be_a_recording(gateway: RunningGateway) -> None:
    async with agent(gateway.base) as user, files() as (place, _):
        for path, expected in {
            "/missing": "source: cannot be fetched: its server answered 404",
            "/round": "source: redirects more than 3 times",
            "/disguised": "source: has an address as its host that is not written as four decimal numbers",
            "/file": "source: must be an address beginning with https:// or http://",
            "/endless": "source: cannot be fetched: URL too long",
            "/page": "neither FLAC nor WAV, MP3 or Ogg",
            "/zip": "source: is sent compressed (gzip)",
            "/large": "the file may have at most 2 MB",
        }.items():
            assert expected in await user.refused("upload_recording", source=f"{place}{path}"), path
        assert "cannot be fetched" in await user.refused("upload_recording", source="http://127.0.0.1:1/song.flac")


async def test_a_song_goes_on_from_a_recording(
    gateway: RunningGateway, local: Agent, flow: Flow, tmp_path: Path
) -> None:
    (tmp_path / "tape.flac").write_bytes(file_of("flac", music(3)))
    async with agent(gateway.base) as user, files() as (place, _):
        fetched = await user.call("upload_recording", source=f"{place}/moved", title="Hum")
        assert (fetched["status"], fetched["title"]) == ("ready", "Hum")
        again = await local.call("upload_recording", source=f"{place}/song.flac")
        assert again["recording_id"] == fetched["recording_id"]
        mine = await local.call("upload_recording", source=str(tmp_path / "tape.flac"))
        assert (mine["status"], mine["duration"], mine["title"]) == ("ready", 3, "tape")
        assert (await local.call("show_recording", recording_id=mine["recording_id"])) == mine
        assert json.loads(await local.read(f"heartmula://recordings/{mine['recording_id']}")) == mine
        assert "No such file" in await local.refused("upload_recording", source=str(tmp_path / "none.flac"))
        assert "404" in await local.refused("upload_recording", source=f"{place}/missing")
        song = await user.call("extend_song", recording_id=mine["recording_id"], lyrics="la", max_duration_ms=4000)
        assert (await user.call("watch_song", job_id=song["job_id"]))["status"] == "completed"
