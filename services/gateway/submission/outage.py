"""Short outages: a request for a song waits until NATS and the store are back, and is told when to come again if not.

Waiting is bounded twice: a request waits for `PATIENCE` seconds, and `AT_ONCE` requests wait at a time.
"""

import asyncio
import math
import time
from contextlib import AbstractAsyncContextManager

from services.gateway.errors import UNKNOWN_SECONDS
from services.gateway.monitoring.health import Health
from services.gateway.songs.eta import pace
from shared.errors import NoRoom, QueueFull, Rejected, Unavailable
from shared.nats.connection import Connection

PATIENCE = 8.0  # seconds, from when a request began
AT_ONCE = 256  # each holds a body of at most 256 KiB
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two attempts of a request
_LONGEST_WAIT = 60  # seconds that are told at most


class Outage:
    """What a gateway's requests know of servers that are away."""

    def __init__(self, nc: Connection, health: Health) -> None:
        self._nc, self._health = nc, health
        self._waiting = 0

    def patience(self) -> "Patience":
        """For a request that begins now."""
        return Patience(self)

    def retry_after(self, error: Exception) -> int:
        """Seconds after which a client should ask again.

        A server is expected to stay away for about as long as it has been; a queue that is full has room again when the
        next song leaves it.
        """
        seconds: float | None = None
        if isinstance(error, NoRoom):
            seconds = _LONGEST_WAIT
        elif isinstance(error, Unavailable):
            since = self._nc.lost_at if error.service == "nats" else self._health.store_lost_at
            seconds = 0.0 if since is None else time.monotonic() - since
        elif isinstance(error, QueueFull):
            now = pace(self._health.workers)
            seconds = now.song_frames / now.tokens if now.song_frames and now.tokens else None
        return UNKNOWN_SECONDS if seconds is None else max(1, min(_LONGEST_WAIT, math.ceil(seconds)))

    async def wait(self, error: Unavailable, deadline: float, pause: float) -> None:
        """Return when the server that was away may be asked again. Raises its error when it is too late for that,
        or waiting is of no use."""
        left = deadline - time.monotonic()
        if left <= 0 or self._waiting >= AT_ONCE or isinstance(error, NoRoom | Rejected):
            raise error
        self._waiting += 1
        try:
            async with asyncio.timeout(left):
                if error.service == "nats":
                    await self._nc.up.wait()
                await asyncio.sleep(pause)
        except TimeoutError:
            raise error from None
        finally:
            self._waiting -= 1


class Patience:
    """How long one request still waits for servers."""

    def __init__(self, outage: Outage) -> None:
        self._outage, self._deadline = outage, time.monotonic() + PATIENCE
        self._pause = _SHORTEST_PAUSE
        self._failed = False

    def attempt(self) -> AbstractAsyncContextManager[object]:
        """The frame of an attempt: those after the first failure end with `TimeoutError` when patience does."""
        return asyncio.timeout(self._deadline - time.monotonic() if self._failed else None)

    async def wait(self, error: Unavailable) -> None:
        """Return when it is worth another attempt, else raise the error."""
        self._failed = True
        await self._outage.wait(error, self._deadline, self._pause)
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
