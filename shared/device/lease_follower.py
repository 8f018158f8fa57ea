"""Following the contenders for a device: who is there, and then every change."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

import nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import DeliverPolicy
from nats.js.errors import APIError

from shared.causes import why
from shared.clock import elapsed
from shared.device.lease_queue import PREFIX, STREAM, LeaseQueue

log = logging.getLogger(__name__)


class LeaseFollower:
    """Feeds a queue. After a reconnect `follow` is called again and begins with a fresh snapshot."""

    def __init__(self, queue: LeaseQueue, scope: str, observe: Callable[[Msg], None]) -> None:
        """`scope` says which keys, as a subject within the bucket; `observe` gets each message."""
        self._queue, self._scope, self._observe = queue, PREFIX + scope, observe
        self._generation = 0  # what still comes from an earlier attempt does not count
        self._following: JetStreamContext.PushSubscription | None = None

    def stop(self) -> None:
        """Take in nothing any more."""
        self._generation += 1

    async def follow(self, js: JetStreamContext) -> None:
        """Returns when who is there has been read, or when a later call or `stop` makes this one needless."""
        self._generation += 1
        latest = self._generation
        while latest == self._generation:
            if await self._follow_once(js):
                return
            await asyncio.sleep(0.25)
            if latest == self._generation:  # a new attempt: what still comes from the old one does not count
                self._generation = latest = latest + 1

    async def _follow_once(self, js: JetStreamContext) -> bool:
        """One attempt. Returns whether nothing is left to do: it succeeded, or a later one is under way."""
        generation, received, highest, snapshot = self._generation, 0, 0, asyncio.Event()
        expected: int | None = None

        async def on_message(message: Msg) -> None:
            nonlocal received, highest
            if generation == self._generation:
                self._observe(message)
                if message.metadata.sequence.stream > highest:  # else it comes twice
                    received, highest = received + 1, message.metadata.sequence.stream
                if expected is not None and received >= expected:
                    snapshot.set()

        self._queue.begin()
        old: JetStreamContext.PushSubscription | None = None
        try:
            old = await js.subscribe(
                self._scope,
                stream=STREAM,
                ordered_consumer=True,
                deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
                idle_heartbeat=1,
                cb=on_message,
            )
            info = await old.consumer_info()
            delivered = info.delivered.consumer_seq if info.delivered else 0
            expected = (info.num_pending or 0) + delivered
            if received < expected:
                async with asyncio.timeout(2):
                    await snapshot.wait()
            if generation == self._generation:
                old, self._following = self._following, old
                self._queue.finish(elapsed())
            return True
        except (nats.errors.Error, APIError, TimeoutError) as error:
            log.warning("lease: cannot follow the others yet: %s", why(error))
            return False
        finally:
            if old is not None:  # of the connection that was lost, or of an attempt that failed
                with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
                    await old.unsubscribe()
