"""The lease on a real nats-server: one holder at a time, in the order of asking, whichever process dies."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import msgspec
import nats
import pytest
from nats.js.errors import BadRequestError

from deploy.local.servers.embedded import NatsServer
from shared.device.lease import Lease, read_leases
from shared.errors import LeaseLost
from shared.nats.streams import bootstrap
from shared.schema.worker import LeaseRecord
from shared.settings import Settings

Make = Callable[..., Lease]


@pytest.fixture
async def make(nats_settings: Settings) -> AsyncIterator[Make]:
    """Factory of leases, which are closed after the test."""
    client = await nats.connect(nats_settings.nats_url)
    await bootstrap(client.jetstream(), nats_settings)
    await client.close()
    made: list[Lease] = []

    def make(role: str, instance: str, settings: Settings = nats_settings, **options: bool) -> Lease:
        lease = Lease(settings, gpu="gpu0", role=role, instance=instance, **options)
        made.append(lease)
        return lease

    yield make
    for lease in made:
        await lease.close()


async def test_two_roles_take_turns_in_the_order_they_asked(make: Make) -> None:
    leases = [make("tokenizer", "a"), make("codec", "b"), make("tokenizer", "c")]
    for lease in leases:
        await lease.start()
    first = await leases[0].acquire()
    queue = []
    for lease in leases[1:]:
        queue.append(asyncio.create_task(lease.acquire()))
        while len(first.waiting()) < len(queue):
            await asyncio.sleep(0.01)
    assert [view.owner for view in first.waiting()] == ["b", "c"]
    assert not any(task.done() for task in queue)

    await first.release()
    second = await queue[0]
    assert not queue[1].done()
    with pytest.raises(LeaseLost):
        first.check()
    second.check()
    await second.release()
    third = await queue[1]
    assert first.fencing_token < second.fencing_token < third.fencing_token
    await third.release()
    # A candidate that comes back stands at the end, and gets a higher token.
    again = await leases[0].acquire()
    assert again.fencing_token > third.fencing_token
    await again.release()


async def test_a_waiting_lease_outlives_many_times_its_ttl(make: Make) -> None:
    a, b = make("tokenizer", "a"), make("codec", "b")
    await a.start()
    await b.start()
    held = await a.acquire()
    waiting = asyncio.create_task(b.acquire())
    for _ in range(10):
        await asyncio.sleep(0.5)
        held.check()
        assert not waiting.done()
    await held.release()
    await (await waiting).release()


async def test_the_phase_is_in_the_record(make: Make, nats_settings: Settings) -> None:
    lease = make("tokenizer", "a")
    await lease.start()
    held = await lease.acquire()
    await held.enter(1)
    client = await nats.connect(nats_settings.nats_url)
    while (await read_leases(client.jetstream()))[0].phase is None:
        await asyncio.sleep(0.02)
    (view,) = await read_leases(client.jetstream())
    assert (view.gpu, view.role, view.owner, view.state, view.phase) == ("gpu0", "tokenizer", "a", "held", 1)
    await held.release()
    assert await read_leases(client.jetstream()) == []
    await client.close()


async def test_cancelling_leaves_the_queue(make: Make) -> None:
    a, b, c = make("tokenizer", "a"), make("codec", "b"), make("codec", "c")
    for lease in (a, b, c):
        await lease.start()
    held = await a.acquire()
    impatient = asyncio.create_task(b.acquire())
    patient = asyncio.create_task(c.acquire())
    while len(held.waiting()) < 2:
        await asyncio.sleep(0.01)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    await held.release()
    await (await patient).release()


async def test_without_exclusion_roles_share_the_device_but_equals_do_not(make: Make) -> None:
    tokenizer, codec, second = (
        make(role, name, exclusive=False) for role, name in (("tokenizer", "a"), ("codec", "b"), ("codec", "c"))
    )
    for lease in (tokenizer, codec, second):
        await lease.start()
    one, two = await tokenizer.acquire(), await codec.acquire()
    one.check()
    two.check()
    waiting = asyncio.create_task(second.acquire())
    while not two.waiting():
        await asyncio.sleep(0.01)
    assert not one.waiting()
    await two.release()
    await (await waiting).release()
    await one.release()


async def test_encoder_and_codec_exclude_each_other_even_where_models_stay(make: Make) -> None:
    tokenizer, codec, encoder = (
        make(role, name, exclusive=False) for role, name in (("tokenizer", "a"), ("codec", "b"), ("encoder", "c"))
    )
    for lease in (tokenizer, codec, encoder):
        await lease.start()
    other, held = await tokenizer.acquire(), await codec.acquire()
    waiting = asyncio.create_task(encoder.acquire())
    while not held.waiting():
        await asyncio.sleep(0.01)
    assert [view.role for view in held.waiting()] == ["encoder"]
    assert not other.waiting()
    await held.release()
    held = await waiting
    waiting = asyncio.create_task(codec.acquire())
    while not held.waiting():
        await asyncio.sleep(0.01)
    assert [view.role for view in held.waiting()] == ["codec"]
    assert not waiting.done()
    await held.release()
    await (await waiting).release()
    await other.release()


async def test_leases_that_the_server_does_not_let_expire_are_deleted_by_a_waiting_contender(
    make: Make, nats_settings: Settings
) -> None:
    client = await nats.connect(nats_settings.nats_url)
    js = client.jetstream()
    dead, unread, later = (f"$KV.GPU_LOCK.gpu0.fencing_tokenizer.{name}" for name in ("dead", "unread", "later"))
    record = LeaseRecord(ticket=0, state="held", role="tokenizer", owner="dead", since=1.0)
    sequence = (await js.publish(dead, msgspec.json.encode(record))).seq
    for subject in (unread, later):
        await js.publish(subject, b"[" * 50_000)
    lease = make("codec", "b")
    await lease.start()
    waiting = asyncio.create_task(lease.acquire())
    while {"dead", "unread"} & {view.owner for view in await read_leases(js)}:
        await js.publish(later, b'{"ticket": {"of a later version": 1}}')  # is renewed, and so waited for
        assert not waiting.done()
        await asyncio.sleep(0.2)
    with pytest.raises(BadRequestError, match="wrong last sequence"):  # its owner wakes
        await js.publish(dead, b"", headers={"Nats-Expected-Last-Subject-Sequence": str(sequence)})
    assert {view.state for view in await read_leases(js)} == {"unreadable", "waiting"}
    await js.publish(later, b"", headers={"KV-Operation": "DEL"})
    await (await waiting).release()
    await client.close()


HOLDER = """
import asyncio, sys, time
from pathlib import Path
from shared.device.lease import Lease
from shared.settings import Settings

async def main():
    settings = Settings(nats_url=sys.argv[1], data_dir=Path(sys.argv[2]), lease_ttl=2)
    lease = Lease(settings, gpu="gpu0", role="tokenizer", instance="child")
    await lease.start()
    held = await lease.acquire()
    print("held", held.fencing_token, flush=True)
    while held.alive:
        time.sleep(0.02)  # on purpose not asyncio.sleep: a busy event loop must not cost the lease
    print("lost", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def holder(settings: Settings) -> asyncio.subprocess.Process:
    """Start a process that holds the lease."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, settings.nats_url, str(settings.data_dir), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    assert (await child.stdout.readline()).startswith(b"held")
    return child


async def test_a_killed_holder_is_followed_when_its_key_expires(make: Make, nats_settings: Settings) -> None:
    lease = make("codec", "b")
    await lease.start()
    child = await holder(nats_settings)
    waiting = asyncio.create_task(lease.acquire())
    await asyncio.sleep(4)
    assert not waiting.done(), "a live holder whose event loop is busy keeps the lease"
    child.kill()
    await child.wait()
    held = await waiting
    held.check()
    await held.release()


async def test_a_stopped_holder_keeps_the_device_until_it_is_gone_and_knows_that_it_lost(
    make: Make, nats_settings: Settings
) -> None:
    lease = make("codec", "b")
    await lease.start()
    child = await holder(nats_settings)
    os.kill(child.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(lease.acquire())
    # Its key expires, but its file lock does not: what it queued on the device may still run.
    await asyncio.sleep(4)
    assert not waiting.done()
    os.kill(child.pid, signal.SIGCONT)
    assert child.stdout is not None
    assert await child.stdout.readline() == b"lost\n"
    child.kill()
    await child.wait()
    await (await waiting).release()


async def test_a_server_restart_does_not_cost_the_lease(
    make: Make, nats_settings: Settings, nats_server: NatsServer
) -> None:
    patient = replace(nats_settings, lease_ttl=8)
    a, b = make("tokenizer", "a", patient), make("codec", "b", patient)
    await a.start()
    await b.start()
    held = await a.acquire()
    waiting = asyncio.create_task(b.acquire())
    while not held.waiting():
        await asyncio.sleep(0.01)
    nats_server.kill()
    await nats_server.start()
    until = time.monotonic() + 10  # longer than a TTL: it is being renewed again
    while time.monotonic() < until:
        held.check()
        assert not waiting.done()
        await asyncio.sleep(0.1)
    await held.release()
    await (await waiting).release()


async def test_a_holder_cut_off_from_nats_stops_before_another_may_begin(
    make: Make, nats_settings: Settings, nats_server: NatsServer
) -> None:
    lease = make("tokenizer", "a")
    await lease.start()
    held = await lease.acquire()
    nats_server.kill()
    began = time.monotonic()
    try:
        while held.alive:
            assert time.monotonic() - began < nats_settings.lease_ttl, "the deadline is past"
            await asyncio.sleep(0.01)
    finally:
        await nats_server.start()
    with pytest.raises(LeaseLost):
        held.check()
    with pytest.raises(LeaseLost):
        await held.enter(1)
    await held.release()
    again = await lease.acquire()
    assert again.fencing_token > held.fencing_token
    await again.release()
