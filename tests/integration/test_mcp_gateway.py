"""MCP at a gateway: who may use it, what it fetches, and what is left behind."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import anyio
import httpx
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.container import Container
from services.gateway.server import GatewayServer
from shared.settings import Settings
from tests.integration.gateway_fixtures import eventually, fresh_settings, in_process
from tests.integration.test_gateway_keys import entry
from tests.integration.test_mcp import SONG, Agent, Way, agent, files

HTTP: tuple[Way, ...] = ("http", "http of 2025")
PING = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
HEADERS = {"Accept": "application/json, text/event-stream"}
Running = tuple[Container, GatewayServer, str]


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("mcp-gateway")
    async with in_process(await fresh_settings(nats_server, s3_server, folder)) as running:
        yield running


async def test_hosts_pages_and_sizes_are_checked_as_elsewhere(gateway: Running) -> None:
    _, _, base = gateway
    async with httpx.AsyncClient(base_url=base, headers=HEADERS, trust_env=False) as http:
        assert (await http.post("/mcp", json=PING)).status_code == 200
        assert (await http.post("/mcp", json=PING, headers={"Host": "elsewhere.example"})).status_code == 421
        assert (await http.post("/mcp", json=PING, headers={"Origin": "https://elsewhere.example"})).status_code == 403
        answer = await http.get("/mcp")
        assert (answer.status_code, answer.headers["allow"]) == (405, "OPTIONS, POST")
        large = {**PING, "params": {"x": "y" * 300_000}}
        assert (await http.post("/mcp", json=large)).status_code == 413
        length_unknown = await http.post("/mcp", content=blocks(300_000), headers={"Content-Type": "application/json"})
        assert length_unknown.status_code == 413


async def test_calls_and_ended_watches_leave_nothing_running(gateway: Running) -> None:
    container, _, base = gateway
    async with agent(base) as user:
        job_id = (await user.call("write_song", **SONG))["job_id"]
        assert not (await user.call("watch_song", job_id=job_id, wait_seconds=0.01))["ended"]
    subscriptions, before = container.broadcaster._subscriptions, len(asyncio.all_tasks())
    for way in HTTP:
        async with agent(base, way) as user:
            for _ in range(25):
                await user.call("show_song", job_id=job_id)
            await begin_and_cancel_watch(user, job_id)
            assert (await user.call("show_song", job_id=job_id))["status"] == "queued"
            if way == "http":  # the connection of the call is closed at once; in 2025, all at the agent's end
                await until(lambda: not subscriptions)
        await until(lambda: not subscriptions)
    await until(lambda: len(asyncio.all_tasks()) <= before)


async def begin_and_cancel_watch(user: Agent, job_id: str) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: user.result("watch_song", job_id=job_id))
        await until(lambda: user.reports)
        group.cancel_scope.cancel()


async def test_recordings_are_not_fetched_from_private_addresses(gateway: Running) -> None:
    _, _, base = gateway
    async with agent(base) as user, files() as (place, asked):
        for source in (
            f"{place}/song.flac",
            place.replace("127.0.0.1", "localhost"),
            "/etc/hosts",
            "file:///etc/hosts",
        ):
            words = await user.refused("upload_recording", source=source)
            assert "private address" in words or "beginning with https:// or http://" in words
        assert asked == []


async def test_a_watch_ends_with_the_gateway(settings: Settings) -> None:
    async with in_process(settings) as (_, server, base), agent(base) as user:
        job_id = (await user.call("write_song", **SONG))["job_id"]
        watch = asyncio.create_task(user.call("watch_song", job_id=job_id))
        await until(lambda: user.reports)
        server.stop()
        assert (await watch)["status"] == "queued"


async def test_each_key_has_songs_of_its_own(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(entry("alice") + entry("bob"))
    async with (
        in_process(replace(settings, api_keys=tmp_path / "keys.toml")) as (_, _, base),
        httpx.AsyncClient(base_url=base, headers=HEADERS, trust_env=False) as http,
        agent(base, key="key-of-alice") as alice,
        agent(base, "http of 2025", key="key-of-bob") as bob,
    ):
        answer = await http.post("/mcp", json=PING)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        job_id = (await alice.call("write_song", **SONG))["job_id"]
        pages = await asyncio.gather(*(user.call("list_songs") for user in (alice, bob) for _ in range(5)))
        assert [len(page["songs"]) for page in pages] == [1] * 5 + [0] * 5
        assert [len((await user.client.list_resources()).resources) for user in (alice, bob)] == [2, 0]
        for tool in ("show_song", "watch_song", "cancel_song"):
            assert "no song has this id" in await bob.refused(tool, job_id=job_id)
        assert (await alice.call("cancel_song", job_id=job_id))["status"] == "cancelled"
        assert (await alice.call("cancel_song", job_id=job_id))["status"] == "cancelled"


async def blocks(size: int) -> AsyncIterator[bytes]:
    """The body of a request whose length is not given before."""
    yield b"[" + b" " * size


async def until(question: Callable[[], object]) -> None:
    """Wait until something is true."""

    async def ask() -> bool:
        return bool(question())

    await eventually(ask, "it does not become true")
