"""Retries: calls that are repeated while a server is away."""

import asyncio
import time

import pytest

from shared.errors import SongError, Unavailable
from shared.worker.draining import Draining
from shared.worker.retry import Retry


class Flaky:
    """Raises some errors, one at each call, then returns 7."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    async def __call__(self) -> int:
        if self.errors:
            raise self.errors.pop(0)
        return 7


@pytest.fixture
def draining() -> Draining:
    return Draining(asyncio.Event())


@pytest.fixture
def retry(draining: Draining) -> Retry:
    return Retry(draining, lambda problem: None)


async def test_a_call_is_repeated_until_the_server_answers(retry: Retry) -> None:
    assert await retry(Flaky(Unavailable("nats", "away"), Unavailable("s3", "away"))) == 7


async def test_an_error_that_is_no_outage_is_raised_at_once(retry: Retry) -> None:
    call = Flaky(SongError("no"), Unavailable("nats", "away"))
    with pytest.raises(SongError):
        await retry(call)
    assert len(call.errors) == 1


async def test_an_outage_is_waited_for_no_longer_than_its_deadline(
    retry: Retry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.worker.retry._OUTAGE_SECONDS", -1)
    with pytest.raises(Unavailable):
        await retry(Flaky(Unavailable("nats", "away")))


async def test_the_deadline_moves_when_draining_begins(
    retry: Retry, draining: Draining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.worker.retry._DRAINING_SECONDS", 0.3)
    errors = [Unavailable("nats", "away") for _ in range(50)]
    waiting = asyncio.create_task(retry(Flaky(*errors)))
    await asyncio.sleep(0)
    draining.begin()
    with pytest.raises(Unavailable):
        async with asyncio.timeout(30):  # long before 120 seconds
            await waiting


async def test_sleep_ends_soon_after_draining_begins(draining: Draining) -> None:
    sleeping = asyncio.create_task(draining.sleep(600))
    await asyncio.sleep(0)
    assert draining.seconds == 0
    draining.begin()
    async with asyncio.timeout(60):
        await sleeping
    assert 0 < draining.seconds < time.monotonic()
