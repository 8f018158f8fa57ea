"""Ordered JetStream consumer: the messages of a stream in their order, without gaps.

A push consumer made by hand, because nats-py's own ordered consumer is silent for seconds after a server restart and
notices a lost message only with the next heartbeat. This one ends instead, and its user begins again: after the last
message that was seen (events, records), or with a fresh snapshot (the lease). So a lost connection loses nothing.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from shared.errors import NotFound, Unavailable
from shared.nats.errors import nats_errors

_HEARTBEAT = 1.0  # seconds
_SILENCE = 3.0  # seconds without even a heartbeat after which the consumer is taken for gone


class OrderedMessages:
    """Messages as they come. The iteration ends when one was lost on the way or came twice."""

    def __init__(self, subscription: Subscription, pending: int, failure: str) -> None:
        self._subscription, self._failure = subscription, failure
        self.pending = pending  # messages that there were at the beginning
        # Whether all that there was when the server sent its latest message or heartbeat has been received.
        self.caught_up = not pending

    async def __aiter__(self) -> AsyncIterator[Msg]:
        """Raises `Unavailable` when the consumer is gone."""
        received = 0
        while True:
            with nats_errors(self._failure):
                message = await self._subscription.next_msg(timeout=_SILENCE)
            if not message.reply:  # a heartbeat: messages of the stream come with a subject for their acknowledgement
                if int((message.headers or {}).get("Nats-Last-Consumer", received)) != received:
                    return
                self.caught_up = True  # it sends heartbeats while it has nothing else to send
                continue
            received += 1
            if message.metadata.sequence.consumer != received:
                return
            self.caught_up = not message.metadata.num_pending
            yield message


@asynccontextmanager
async def ordered(
    nc: Client, js: JetStreamContext, stream: str, first: int, subject: str | None = None
) -> AsyncIterator[OrderedMessages]:
    """All messages of a stream from the sequence `first` on; with `subject` those on it alone, wildcards allowed.

    In a stream that keeps one message a subject, `first` 1 means a snapshot and then every change.
    Raises `Unavailable`, also when there is no such stream.
    """
    failure = f"the stream {stream} cannot be followed"
    inbox = nc.new_inbox()
    with nats_errors(failure):
        subscription = await nc.subscribe(inbox)
    consumer = ""
    try:
        try:
            with nats_errors(failure):
                info = await js.add_consumer(
                    stream,
                    ConsumerConfig(
                        deliver_subject=inbox,
                        deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                        opt_start_seq=first,
                        filter_subject=subject,
                        ack_policy=AckPolicy.NONE,
                        idle_heartbeat=_HEARTBEAT,
                        inactive_threshold=5.0,  # if it cannot be deleted below; there is no coming back to it
                        mem_storage=True,
                        num_replicas=1,
                    ),
                )
        except NotFound as error:
            raise Unavailable("nats", str(error)) from error
        consumer = info.name
        yield OrderedMessages(subscription, info.num_pending or 0, failure)
    finally:
        with contextlib.suppress(Unavailable, NotFound), nats_errors("the consumer cannot be deleted"):
            await subscription.unsubscribe()
            if consumer:
                async with asyncio.timeout(1):
                    await js.delete_consumer(stream, consumer)
