"""Short outages: a request waits until NATS and the object store are back, or is refused with Retry-After.

Waiting is limited twice: a request waits for `PATIENCE` seconds, and at most `MAX_WAITING` requests wait at once.
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
MAX_WAITING = 256  # each holds a body of at most 256 KiB
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two attempts of a request
_LONGEST_RETRY = 60  # seconds; no Retry-After is longer


class Outage:
    """The servers that are away, as the requests of one gateway see them."""

    def __init__(self, nc: Connection, health: Health) -> None:
        self._nc, self._health = nc, health
        self._waiting = 0

    def begin_request(self) -> "RequestWait":
        """The waiting time of a request that begins now."""
        return RequestWait(self)

    def retry_after(self, error: Exception) -> int:
        """Seconds after which a client should send its request again.

        A server is expected to stay away for about as long as it has been away; a full queue has room again when the
        next song leaves it.
        """
        seconds: float | None = None
        if isinstance(error, NoRoom):
            seconds = _LONGEST_RETRY
        elif isinstance(error, Unavailable):
            since = self._nc.lost_at if error.service == "nats" else self._health.store_lost_at
            seconds = 0.0 if since is None else time.monotonic() - since
        elif isinstance(error, QueueFull):
            now = pace(self._health.workers)
            seconds = now.song_frames / now.tokens if now.song_frames and now.tokens else None
        return UNKNOWN_SECONDS if seconds is None else max(1, min(_LONGEST_RETRY, math.ceil(seconds)))

    async def wait(self, error: Unavailable, deadline: float, pause: float) -> None:
        """Return when the server that was away may be tried again.

        Raises `error` when the deadline has passed, too many requests wait, or waiting does not help.
        """
        left = deadline - time.monotonic()
        if left <= 0 or self._waiting >= MAX_WAITING or isinstance(error, NoRoom | Rejected):
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


class RequestWait:
    """The waiting time of one request for servers that are away."""

    def __init__(self, outage: Outage) -> None:
        self._outage, self._deadline = outage, time.monotonic() + PATIENCE
        self._pause = _SHORTEST_PAUSE
        self._failed = False

    def attempt(self) -> AbstractAsyncContextManager[object]:
        """The context of an attempt. Attempts after a failure end with `TimeoutError` when the request's time is up."""
        return asyncio.timeout(self._deadline - time.monotonic() if self._failed else None)

    async def until_back(self, error: Unavailable) -> None:
        """Return when another attempt may succeed; raises `error` when there is none to be made."""
        self._failed = True
        await self._outage.wait(error, self._deadline, self._pause)
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
