"""The connection to NATS: which server is taken, and how one that goes away later is waited for.

What is said of servers that are not there is tested in test_servers_away.py.
"""

import asyncio

import nats.errors
import pytest

from deploy.local.servers.embedded import NatsServer, free_port
from shared.nats.connection import connect
from shared.settings import Settings
from tests.integration.gateway_fixtures import eventually


async def test_one_node_of_several_suffices(nats_server: NatsServer) -> None:
    away = nats_server.url.replace(str(nats_server.port), str(free_port()))
    client = await connect(Settings(nats_url=f"{away},{nats_server.url},{away}"), "test")
    assert client.is_connected
    await client.close()


async def test_a_server_that_comes_back_is_found_again(nats_server: NatsServer) -> None:
    client = await connect(Settings(nats_url=nats_server.url), "test")
    nats_server.kill()
    await nats_server.start()
    assert await client.jetstream(timeout=20).account_info()
    await client.close()


async def test_pauses_between_attempts_grow_to_a_second_and_no_further(nats_server: NatsServer) -> None:
    client = await connect(Settings(nats_url=nats_server.url), "test")
    pauses: list[float] = []

    async def long() -> bool:
        pauses.append(client.options["reconnect_time_wait"])
        return pauses.count(1.0) > 10

    assert client.trouble is None
    await nats_server.stop()
    try:
        await eventually(long, "pauses did not grow")
        assert pauses == sorted(pauses)
        assert pauses[0] < 0.25
        assert pauses[-1] == 1.0
        assert "connection refused" in str(client.trouble)
    finally:
        await nats_server.start()
    await client.up.wait()
    assert client.options["reconnect_time_wait"] == pauses[0]
    assert client.lost_at is None
    await client.close()


async def test_an_answer_that_was_lost_with_the_connection_is_not_waited_for(nats_server: NatsServer) -> None:
    client = await connect(Settings(nats_url=nats_server.url), "test")
    await client.subscribe("mute")  # takes what is asked, and does not answer
    asking = asyncio.create_task(client.request("mute", timeout=1000))
    await client.flush()
    await nats_server.stop()
    try:
        with pytest.raises(nats.errors.UnexpectedEOF):
            await asking
    finally:
        await nats_server.start()
        await client.close()
