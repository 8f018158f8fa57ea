"""Crashes and restarts of nats-server bring leases of dead workers back; the device is still given to a live one.

`make chaos` kills a whole stack in this way, seven times.
"""

import asyncio
from pathlib import Path

import msgspec
import nats
import pytest

from deploy.local.servers.embedded import ROLES, NatsServer, free_port
from deploy.setup import set_up
from shared.device.lease import Lease, read_leases
from shared.schema.worker import LeaseRecord
from shared.settings import Settings

CRASHES = 7  # at most


async def work(server: NatsServer, name: str, *, release: bool) -> None:
    """Let one worker hold the device and another wait for it for a moment. With `release` they release their leases."""
    client = await nats.connect(server.url)
    js, subjects = client.jetstream(), set()
    for _ in range(3):
        for role, state in (("tokenizer", "held"), ("codec", "waiting")):
            record = LeaseRecord(ticket=0, state=state, role=role, owner=name, since=1.0)  # type: ignore[arg-type]
            subject = f"$KV.GPU_LOCK.gpu0.{role}.{name}"
            subjects.add(subject)
            await js.publish(subject, msgspec.json.encode(record), headers={"Nats-TTL": "1s"})
        await asyncio.sleep(0.2)
    for subject in subjects if release else ():
        await js.publish(subject, b"", headers={"KV-Operation": "DEL", "Nats-TTL": "1s"})
    await client.close()


async def came_back(server: NatsServer) -> bool:
    """Whether leases that expired long ago exist again."""
    client = await nats.connect(server.url)
    await asyncio.sleep(1.0)  # in which the server could still let them expire
    found = await read_leases(client.jetstream())
    await client.close()
    return any(view.state == "held" for view in found)


# A lease comes back if its marker too ran out while the server was down. Outside of this test that takes a minute.
async def test_the_device_is_given_although_leases_of_the_dead_came_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.nats.streams.LOCK_MARKER_TTL", 1)
    server = NatsServer(tmp_path, free_port(), dict.fromkeys(ROLES, "secret"))
    settings = Settings(nats_url=server.url_of("codec"), data_dir=tmp_path, lease_ttl=2)
    await server.start()
    try:
        await set_up(Settings(nats_url=server.url_of("bootstrap")))
        for number in range(CRASHES):
            await work(server, f"killed-{number}", release=False)
            server.kill()
            await asyncio.sleep(2.2)
            await server.start()
            if number and await came_back(server):
                break
            await work(server, f"ended-{number}", release=True)
            await server.stop()
            await server.start()
        else:
            pytest.skip("this nats-server brings no lease back")
        lease = Lease(settings, gpu="gpu0", role="codec", instance="alive")
        await lease.start()
        async with asyncio.timeout(60):
            held = await lease.acquire()
        assert {view.owner for view in held.waiting()} == set()
        await held.release()
        await lease.close()
    finally:
        await server.stop()
