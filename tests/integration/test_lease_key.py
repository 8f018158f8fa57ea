"""A candidate's key on a real nats-server: every write and delete is a compare-and-set, and none comes too late."""

from collections.abc import AsyncIterator

import nats
import pytest
from nats.js import JetStreamContext

from shared.device.lease_key import LeaseKey
from shared.device.lease_queue import STREAM
from shared.errors import LeaseLost, Unavailable, WrongSequence
from shared.nats.streams import bootstrap
from shared.schema.worker import LeaseRecord
from shared.settings import Settings

SUBJECT, TTL = "$KV.GPU_LOCK.gpu0.codec.a", 10
WAITING = LeaseRecord(ticket=0, state="waiting", role="codec", owner="a", since=1.0)
HELD = LeaseRecord(ticket=1, state="held", role="codec", owner="a", since=1.0)


@pytest.fixture
async def js(nats_settings: Settings) -> AsyncIterator[JetStreamContext]:
    """JetStream with its buckets."""
    nc = await nats.connect(nats_settings.nats_url)
    await bootstrap(nc.jetstream(), nats_settings)
    yield nc.jetstream()
    await nc.close()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time by which keys are judged."""
    now = [100.0]
    monkeypatch.setattr("shared.device.lease_key.elapsed", lambda: now[0])
    return now


async def test_a_key_is_entered_renewed_and_deleted(js: JetStreamContext, now: list[float]) -> None:
    key = LeaseKey(js, SUBJECT, TTL)
    assert await key.read() is None
    assert await key.enter(WAITING) == key.sequence
    assert await key.read() == WAITING
    before = key.sequence
    assert await key.renew(HELD) > before
    message = await js.get_msg(STREAM, subject=SUBJECT)
    assert (message.seq, (message.headers or {})["Nats-TTL"]) == (key.sequence, "10s")
    await key.delete()
    assert await key.read() is None
    assert key.sequence == (message.seq or 0) + 1  # the marker's, over which the next entry is written
    await key.enter(WAITING)


async def test_a_key_that_another_write_has_moved_is_neither_written_nor_deleted(
    js: JetStreamContext, now: list[float]
) -> None:
    key, other = LeaseKey(js, SUBJECT, TTL), LeaseKey(js, SUBJECT, TTL)
    await key.enter(WAITING)
    await other.read()
    await other.enter(HELD)
    deadline, now[0] = key.deadline, 101.0
    for attempt in (lambda: key.renew(WAITING), lambda: key.enter(WAITING), key.delete):
        with pytest.raises(WrongSequence):
            await attempt()
    assert key.deadline == deadline
    assert await key.read() == HELD
    assert key.sequence == other.sequence


async def test_the_deadline_is_counted_from_before_the_write_and_nothing_is_renewed_after_it(
    js: JetStreamContext, now: list[float]
) -> None:
    key = LeaseKey(js, SUBJECT, TTL)
    await key.enter(WAITING)
    assert key.deadline == 100 + TTL - 1
    now[0] = 105.0
    await key.renew(HELD)
    assert key.deadline == 105 + TTL - 1
    now[0] = key.deadline
    with pytest.raises(LeaseLost):
        await key.renew(HELD)


async def test_without_an_answer_the_deadline_stays(
    js: JetStreamContext, now: list[float], nats_settings: Settings
) -> None:
    nc = await nats.connect(nats_settings.nats_url)
    key = LeaseKey(nc.jetstream(), SUBJECT, TTL)
    await key.enter(WAITING)
    await nc.close()
    now[0] = 101.0
    for attempt in (key.read, lambda: key.renew(HELD), key.delete):
        with pytest.raises(Unavailable):
            await attempt()
    assert key.deadline == 100 + TTL - 1
