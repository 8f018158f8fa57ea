"""One delivered message of a work queue, with nats-py's errors mapped."""

from collections.abc import Mapping
from datetime import datetime

from nats.aio.msg import Msg

from shared.nats.errors import nats_errors


class QueueMessage:
    """A message that this worker holds until it is acknowledged, given back or discarded.

    Every method raises `Unavailable` when NATS cannot be reached.
    """

    def __init__(self, msg: Msg) -> None:
        self.subject, self.data = msg.subject, msg.data
        self.headers: Mapping[str, str] | None = msg.headers
        self._msg = msg

    @property
    def redelivered(self) -> bool:
        """Whether it was delivered before."""
        return self._msg.metadata.num_delivered > 1

    @property
    def queued_at(self) -> datetime:
        """When it came into the queue."""
        return self._msg.metadata.timestamp

    async def acknowledge(self) -> None:
        """Take it out of the queue, and wait until the server has done so."""
        with nats_errors("a message cannot be acknowledged"):
            await self._msg.ack_sync()

    async def give_back(self, delay: float = 0) -> None:
        """Let it be delivered again, not before `delay` seconds are over."""
        with nats_errors("a message cannot be given back"):
            await self._msg.nak(delay=delay or None)

    async def keep(self) -> None:
        """Restart the time after which it would be delivered again."""
        with nats_errors("a message cannot be kept"):
            await self._msg.in_progress()

    async def discard(self) -> None:
        """Take it out of the queue although its work was not done."""
        with nats_errors("a message cannot be discarded"):
            await self._msg.term()
