"""Limits on concurrent deliveries of webhooks, so that slow hosts do not delay quick ones."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

QUICK, SLOW = 64, 64  # deliveries at once
SLOW_AFTER = 2.0  # seconds


class SlotsFull(Exception):
    """A delivery became slow while all slots for slow ones were taken."""


class DeliverySlots:
    """A delivery takes one of `QUICK` slots. One that becomes slow leaves it to the next and takes one of `SLOW`; it
    ends when all of those are taken. So `QUICK` deliveries can begin every two seconds, however slow the others are.
    """

    def __init__(self) -> None:
        self._quick = asyncio.Semaphore(QUICK)
        self._slow = 0

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Hold a slot while the context lasts. Raises `SlotsFull` when it has to end early."""
        await self._quick.acquire()
        loop, slow = asyncio.get_running_loop(), False

        def become_slow() -> None:
            nonlocal slow
            if self._slow < SLOW:
                slow = True
                self._slow += 1
                self._quick.release()
            else:
                limit.reschedule(loop.time())

        timer = loop.call_later(SLOW_AFTER, become_slow)
        try:
            async with asyncio.timeout(None) as limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise SlotsFull from None
            raise
        finally:
            timer.cancel()
            if slow:
                self._slow -= 1
            else:
                self._quick.release()
