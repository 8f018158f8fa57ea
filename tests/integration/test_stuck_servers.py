"""Embedded servers that no longer accept writes after a full disk."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.servers.embedded import Server
from deploy.local.servers.watchdog import Watchdog
from shared.aio import end
from shared.settings import Settings
from tests.integration.gateway_fixtures import SONG, eventually, running_gateway
from tests.integration.volumes import Volume, break_store, nats_on, store_on, volume


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Volume]:
    """A small volume."""
    with volume(tmp_path / "disk", 200) as found:
        yield found


async def test_a_server_that_cannot_write_is_restarted_once_there_is_free_space(
    disk: Volume, settings: Settings
) -> None:
    async with nats_on(disk, settings) as (broker, changed), store_on(disk, changed) as (store, changed):
        servers: list[Server] = [broker, store]
        restarted: list[str] = []

        async def restart(name: str) -> None:
            (server,) = (server for server in servers if server.name == name)
            server.kill()
            await server.start()
            restarted.append(name)

        async with running_gateway(changed, settings.data_dir) as gateway:
            healing = asyncio.create_task(Watchdog(servers, changed.s3_bucket, restart, every=0.3).run())
            try:
                await break_store(gateway.store, disk)
                assert (await gateway.http.post("/generate", json=SONG)).status_code == 503
                assert restarted == []
                disk.make_room()

                async def both() -> bool:
                    return sorted(restarted) == ["nats", "s3"]

                await eventually(both, "nothing was started again")
                await gateway.accepted()
                assert sorted(restarted) == ["nats", "s3"]
            finally:
                await end(healing)
