"""Checks that the object store takes results before a song begins: its work could not be stored otherwise."""

import asyncio
import time

from shared.errors import Unavailable
from shared.storage.objects import ObjectStore

_PROVEN_SECONDS = 60.0  # for which a write proves that there can be another
_PATIENCE = 10.0  # seconds for a proof
_PAUSES = (0.5, 5.0)  # seconds between two looks: at first, and at most


class WriteGate:
    """Checks before the device is taken; free of cost while results are written anyway."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._doubted = False
        self.pause = _PAUSES[0]  # seconds to wait before the next look, after one that found an obstacle

    def doubt(self) -> None:
        """Let earlier writes prove nothing any more: another request to the store failed."""
        self._doubted = True

    async def obstacle(self) -> str | None:
        """Why results cannot be stored; None when they can, as far as is known."""
        if reason := await self._look():
            self.pause = min(2 * self.pause, _PAUSES[1])
            return f"songs wait, because the object store takes no results: {reason}"
        self.pause = _PAUSES[0]
        return None

    async def _look(self) -> str | None:
        at = self._store.written_at
        if at is not None and time.monotonic() - at < _PROVEN_SECONDS and not (self._doubted or self._store.trouble):
            return None
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._store.prove_writing()
                if self._doubted:
                    await self._store.ping()
        except Unavailable as error:
            return str(error)
        except TimeoutError:
            return "it does not answer in time"
        self._doubted = False
        return self._store.trouble  # of a song's own object: it is over when that was written
