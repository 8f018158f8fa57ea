"""A stream's messages in their order, by a push consumer made by hand.

nats-py's own ordered consumer is silent for seconds after a server restart. This one ends instead, and whoever uses it
begins again after the last message that was seen, so a lost connection loses nothing.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError

_HEARTBEAT = 1.0  # seconds
_SILENCE = 3.0  # seconds without even a heartbeat after which the consumer is taken for gone


class Ordered:
    """Messages as they come. The iteration ends when one was dropped on the way."""

    def __init__(self, subscription: Subscription, pending: int) -> None:
        self._subscription = subscription
        self.pending = pending  # messages that there were at the beginning

    async def __aiter__(self) -> AsyncIterator[Msg]:
        """Raises `TimeoutError` when the consumer is gone, and nats-py's errors."""
        received = 0
        while True:
            message = await self._subscription.next_msg(timeout=_SILENCE)
            headers = message.headers or {}
            if headers.get("Status"):
                if int(headers.get("Nats-Last-Consumer", received)) != received:
                    return
                continue
            received += 1
            if message.metadata.sequence.consumer != received:
                return
            yield message


@asynccontextmanager
async def ordered(nc: Client, js: JetStreamContext, stream: str, first: int) -> AsyncIterator[Ordered]:
    """All messages of a stream from the sequence `first` on. Raises nats-py's errors."""
    inbox = nc.new_inbox()
    subscription = await nc.subscribe(inbox)
    consumer = ""
    try:
        info = await js.add_consumer(
            stream,
            ConsumerConfig(
                deliver_subject=inbox,
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=first,
                ack_policy=AckPolicy.NONE,
                idle_heartbeat=_HEARTBEAT,
                inactive_threshold=5.0,  # if it cannot be deleted below; there is no coming back to it
                mem_storage=True,
                num_replicas=1,
            ),
        )
        consumer = info.name
        yield Ordered(subscription, info.num_pending or 0)
    finally:
        with contextlib.suppress(nats.errors.Error, APIError, TimeoutError, OSError):
            await subscription.unsubscribe()
            if consumer:
                async with asyncio.timeout(1):
                    await js.delete_consumer(stream, consumer)
