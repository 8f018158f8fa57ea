"""Setting up NATS: what is missing is created, what differs is changed, and services wait for it."""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import nats
import pytest

from deploy.local.servers.embedded import ROLES, NatsServer, free_port
from deploy.setup import main, set_up
from shared.errors import Unavailable
from shared.nats.connection import connect
from shared.nats.streams import LOCK_MAX_AGE, consumers, require_streams, streams
from shared.nats.subjects import (
    DEC,
    DEC_CONSUMERS,
    INTAKE,
    INTAKE_CONSUMER,
    TENANT,
    decode_subject,
    intake_queue_subject,
)
from shared.settings import Settings
from tests.integration.flow import as_role, environment, open_flow
from tests.integration.gateway_fixtures import eventually


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NatsServer]:
    """A server for this module alone, which leaves alone what other tests have set up."""
    server = NatsServer(tmp_path_factory.mktemp("setup"), free_port(), {role: f"secret-{role}" for role in ROLES})
    await server.start()
    await set_up(Settings(nats_url=server.url_of("bootstrap")))
    yield server
    await server.stop()


async def test_services_wait_until_nats_has_been_set_up(settings: Settings) -> None:
    client = await connect(as_role(settings, "gateway"), "test")
    with pytest.raises(Unavailable, match=r"python -m deploy\.setup"):
        await require_streams(client.jetstream())
    await client.close()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.gateway"),
        env=environment(settings, "gateway"),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    assert b"deploy.setup" in await process.stderr.readline()
    process.kill()
    await process.wait()
    async with open_flow(settings):
        pass


async def test_an_earlier_version_gets_what_is_missing_and_keeps_its_songs(server: NatsServer) -> None:
    client = await nats.connect(server.url)
    js = client.jetstream()
    await js.delete_stream(DEC)
    await js.delete_stream(INTAKE)
    (queue,) = (stream for stream in streams(500) if stream.name == DEC)
    await js.add_stream(replace(queue, subjects=["jobs.dec.*"]))
    (lane,) = (consumer for _, consumer in consumers(20) if consumer.durable_name == DEC_CONSUMERS["normal"])
    await js.add_consumer(DEC, lane)
    await js.publish(decode_subject("old"), b"{}")
    await set_up(Settings(nats_url=server.url_of("bootstrap")))
    await js.publish(decode_subject("old", "high"), b"{}")

    await js.publish(intake_queue_subject(TENANT), b"{}")

    async def pending() -> bool:  # the server counts a little later
        found = [*await js.consumers_info(DEC), await js.consumer_info(INTAKE, INTAKE_CONSUMER)]
        return {info.name: info.num_pending for info in found} == {"dec": 1, "dec-live": 1, "enc": 0, "intake": 1}

    await eventually(pending, "a message waits for no consumer")
    await client.close()


async def test_setting_up_again_changes_what_was_set_otherwise(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEARTMULA_NATS_URL", server.url_of("bootstrap"))
    monkeypatch.setenv("HEARTMULA_QUEUE_LIMIT", "33")
    client = await nats.connect(server.url)
    old = replace(next(stream for stream in streams(33) if stream.name == "KV_GPU_LOCK"), max_age=None)
    await client.jetstream().delete_stream("KV_GPU_LOCK")
    await client.jetstream().add_stream(old)
    await client.close()
    assert await asyncio.to_thread(main) == 0
    client = await nats.connect(server.url)
    assert (await client.jetstream().stream_info("TOK")).config.max_msgs == 33
    assert (await client.jetstream().stream_info("KV_GPU_LOCK")).config.max_age == LOCK_MAX_AGE
    assert len(await client.jetstream().streams_info()) == len(streams(33))
    await client.close()
    monkeypatch.setenv("HEARTMULA_NATS_URL", "")
    assert await asyncio.to_thread(main) == 2
