"""Connecting: a server that is not there is told, a server that goes away later is waited for."""

import pytest

from deploy.local.servers import NatsServer, free_port
from shared.errors import Unavailable
from shared.settings import Settings
from shared.topology import connect


async def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(Unavailable, match=r"no connection to NATS: .*failed"):
        await connect(Settings(nats_url=f"nats://127.0.0.1:{free_port()}"), "test")


async def test_wrong_credentials_are_told(nats_server: NatsServer) -> None:
    url = f"nats://gateway:wrong@127.0.0.1:{nats_server.port}"
    with pytest.raises(Unavailable, match=r"(?i)authorization"):
        await connect(Settings(nats_url=url), "test")


async def test_a_server_that_comes_back_is_found_again(nats_server: NatsServer) -> None:
    client = await connect(Settings(nats_url=nats_server.url), "test")
    nats_server.kill()
    await nats_server.start()
    assert await client.jetstream(timeout=20).account_info()
    await client.close()
