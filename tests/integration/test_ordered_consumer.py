"""The ordered consumer on a real nats-server: every message once and in order, and an end where one is missing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from deploy.local.servers.embedded import NatsServer
from shared.errors import Unavailable
from shared.nats.ordered_consumer import ordered
from shared.settings import Settings

STREAM = "TEST"


@pytest.fixture
async def nc(nats_settings: Settings) -> AsyncIterator[Client]:
    """A connection to a server with one stream, in which two subjects have three messages each."""
    nc = await nats.connect(nats_settings.nats_url)
    js = nc.jetstream()
    await js.add_stream(name=STREAM, subjects=["test.>"])
    for number in range(3):
        await js.publish("test.a", f"a{number}".encode())
        await js.publish("test.b", f"b{number}".encode())
    yield nc
    await nc.close()


async def take(messages: AsyncIterator[Msg], number: int) -> list[str]:
    """The bodies of the next messages."""
    return [(await anext(messages)).data.decode() for _ in range(number)]


async def consumers(js: JetStreamContext) -> list[str]:
    """Names of the stream's consumers."""
    return [info.name for info in await js.consumers_info(STREAM)]


async def test_messages_come_from_the_first_sequence_on_and_then_as_they_are_published(nc: Client) -> None:
    js = nc.jetstream()
    async with ordered(nc, js, STREAM, 3) as messages:
        assert messages.pending == 4
        found = aiter(messages)
        assert await take(found, 4) == ["a1", "b1", "a2", "b2"]
        await js.publish("test.a", b"a3")
        assert await take(found, 1) == ["a3"]
    assert await consumers(js) == []


async def test_a_message_with_the_header_of_a_heartbeat_is_a_message(nc: Client) -> None:
    js = nc.jetstream()
    async with ordered(nc, js, STREAM, 7) as messages:
        found = aiter(messages)
        await js.publish("test.a", b"a3", headers={"Status": "100", "Nats-Last-Consumer": "none"})
        await js.publish("test.a", b"a4")
        assert await take(found, 2) == ["a3", "a4"]


async def test_a_subject_leaves_the_others_out(nc: Client) -> None:
    async with ordered(nc, nc.jetstream(), STREAM, 1, "test.b") as messages:
        assert messages.pending == 3
        assert await take(aiter(messages), 3) == ["b0", "b1", "b2"]


@asynccontextmanager
async def losing(nc: Client, body: bytes) -> AsyncIterator[None]:
    """The connection loses the message with this body."""
    process = nc._process_msg

    async def lose(sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        if data != body:
            await process(sid, subject, reply, data, headers)

    nc._process_msg = lose  # type: ignore[method-assign]
    yield
    nc._process_msg = process  # type: ignore[method-assign]


@pytest.mark.parametrize("last", [False, True], ids=["the next message shows it", "the next heartbeat shows it"])
async def test_the_iteration_ends_where_a_message_is_missing(nc: Client, last: bool) -> None:
    async with losing(nc, b"b2" if last else b"b1"), ordered(nc, nc.jetstream(), STREAM, 1) as messages:
        found = [message.data.decode() async for message in messages]
    assert found == (["a0", "b0", "a1", "b1", "a2"] if last else ["a0", "b0", "a1"])


async def test_a_consumer_that_the_server_forgot_is_an_error(nc: Client) -> None:
    js = nc.jetstream()
    async with ordered(nc, js, STREAM, 1, "test.a") as messages:
        found = aiter(messages)
        await take(found, 3)
        for name in await consumers(js):
            await js.delete_consumer(STREAM, name)
        with pytest.raises(Unavailable, match="the stream TEST cannot be followed: no answer yet"):
            await anext(found)


async def test_without_a_stream_or_a_server_there_is_nothing_to_follow(nc: Client, nats_server: NatsServer) -> None:
    js = nc.jetstream(timeout=1)
    with pytest.raises(Unavailable, match="the stream MISSING cannot be followed: stream not found"):
        async with ordered(nc, js, "MISSING", 1):
            pass
    nats_server.kill()
    with pytest.raises(Unavailable, match="cannot be followed"):
        async with asyncio.timeout(10), ordered(nc, js, STREAM, 1):
            pass
