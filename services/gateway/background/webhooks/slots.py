"""Room for deliveries to hosts, of which some are slow."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

QUICK, SLOW = 64, 64  # at once
SLOW_AFTER = 2.0  # seconds


class Crowded(Exception):
    """A delivery was slow while as many others were as may be."""


class HostSlots:
    """A delivery takes one of `QUICK` places. One that turns out to be slow leaves it to the next and takes one of
    `SLOW`; while those are taken it ends. So `QUICK` deliveries can begin every two seconds, whatever the others do.
    """

    def __init__(self) -> None:
        self._quick = asyncio.Semaphore(QUICK)
        self._slow = 0

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """A place while the context lasts. Raises `Crowded` when it ends before its time."""
        await self._quick.acquire()
        loop, slow = asyncio.get_running_loop(), False

        def move() -> None:
            nonlocal slow
            if self._slow < SLOW:
                slow = True
                self._slow += 1
                self._quick.release()
            else:
                limit.reschedule(loop.time())

        timer = loop.call_later(SLOW_AFTER, move)
        try:
            async with asyncio.timeout(None) as limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise Crowded from None
            raise
        finally:
            timer.cancel()
            if slow:
                self._slow -= 1
            else:
                self._quick.release()
