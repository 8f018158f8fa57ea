"""The order of songs in the engine: one at a time, and a song with a listener before others."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class DeviceQueue:
    """Songs in hand that wait for the engine, first come, first served; one that has it may give way at a window."""

    def __init__(self) -> None:
        self._free = asyncio.Lock()
        self._waiting: list[str] = []

    @asynccontextmanager
    async def turn(self, job_id: str) -> AsyncIterator[None]:
        """Have the engine for the body."""
        self._waiting.append(job_id)
        try:
            await self._free.acquire()
        finally:
            self._waiting.remove(job_id)
        try:
            yield
        finally:
            self._free.release()

    def is_pressed(self, own: float | None, dry_in: Callable[[str], float | None]) -> bool:
        """Whether a song should give way to one that waits, whose listener runs dry sooner.

        `dry_in` gives the seconds until a song's listener runs dry, None where it has none; `own` are those of the
        song that has the engine.
        """
        others = [seconds for job_id in self._waiting if (seconds := dry_in(job_id)) is not None]
        return bool(others) and (own is None or min(others) < own)
