"""Keeps a `LeaseQueue` up to date: a snapshot of the candidates' keys, then every change."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from shared.aio import end
from shared.clock import elapsed
from shared.device.lease_queue import PREFIX, STREAM, LeaseQueue
from shared.errors import Unavailable
from shared.nats.ordered_consumer import OrderedMessages, ordered

log = logging.getLogger(__name__)

_SNAPSHOT_SECONDS = 2.0  # after which a snapshot that is not complete is begun again
_PAUSE_SECONDS = 0.25  # after an attempt that failed


class LeaseFollower:
    """Feeds a queue. Whatever may have been missed, by a gap or while disconnected, is read in a fresh snapshot."""

    def __init__(
        self, queue: LeaseQueue, scope: str, observe: Callable[[Msg], None], on_snapshot: Callable[[], None]
    ) -> None:
        """`scope` says which keys, as a subject within the bucket.

        `observe` gets each message; `on_snapshot` is called when a snapshot has been read.
        """
        self._queue, self._scope = queue, PREFIX + scope
        self._observe, self._on_snapshot = observe, on_snapshot
        self._restart = asyncio.Event()
        self._messages: OrderedMessages | None = None

    @property
    def caught_up(self) -> bool:
        """Whether the queue shows every write up to the latest one that it shows.

        A key that is written again before its earlier write was delivered is only seen with the later one.
        """
        return self._queue.complete and self._messages is not None and self._messages.caught_up

    def restart(self) -> None:
        """Begin again with a fresh snapshot, at once: the connection was lost and is back."""
        self._restart.set()

    async def run(self, nc: Client, js: JetStreamContext) -> None:
        """Follow for ever."""
        while True:
            self._restart.clear()
            attempt = asyncio.create_task(self._follow(nc, js))
            restart = asyncio.create_task(self._restart.wait())
            try:
                await asyncio.wait({attempt, restart}, return_when=asyncio.FIRST_COMPLETED)
                self._queue.begin()  # before anything is awaited: no key is timed while it is not followed
            finally:
                await end(attempt, restart)
            if not attempt.cancelled() and (error := attempt.exception()):
                await self._recover(nc, error)

    async def _recover(self, nc: Client, error: BaseException) -> None:
        if not isinstance(error, Unavailable):
            log.error("lease: unexpected while following the others", exc_info=error)
        elif nc.is_connected:
            log.warning("lease: cannot follow the others yet: %s", error)
        else:
            await self._restart.wait()  # set as soon as the connection is back
            return
        await asyncio.sleep(_PAUSE_SECONDS)

    async def _follow(self, nc: Client, js: JetStreamContext) -> None:
        """Read a snapshot and then every change. Returns after a gap; raises `Unavailable`."""
        async with ordered(nc, js, STREAM, 1, self._scope) as messages:
            self._messages, changes = messages, aiter(messages)
            try:
                async with asyncio.timeout(_SNAPSHOT_SECONDS):
                    complete = await self._read_snapshot(messages, changes)
            except TimeoutError:
                raise Unavailable("nats", "not all candidates could be read") from None
            if complete:
                self._queue.finish(elapsed())
                self._on_snapshot()
                async for message in changes:
                    self._observe(message)

    async def _read_snapshot(self, messages: OrderedMessages, changes: AsyncIterator[Msg]) -> bool:
        """Returns whether all that there was at the beginning has been read; False after a gap."""
        if not messages.pending:
            return True
        received = 0
        async for message in changes:
            self._observe(message)
            received += 1
            if received >= messages.pending and messages.caught_up:
                return True
        return False
