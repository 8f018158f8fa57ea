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
        """Whether the message was delivered before."""
        return self._msg.metadata.num_delivered > 1

    @property
    def queued_at(self) -> datetime:
        """Time at which the message was queued."""
        return self._msg.metadata.timestamp

    async def acknowledge(self) -> None:
        """Remove the message from the queue, and wait until the server has done so."""
        with nats_errors("a message cannot be acknowledged"):
            await self._msg.ack_sync()

    async def give_back(self, delay: float = 0) -> None:
        """Have the message delivered again after at least `delay` seconds."""
        with nats_errors("a message cannot be given back"):
            await self._msg.nak(delay=delay or None)

    async def keep(self) -> None:
        """Restart the time after which the message would be delivered again."""
        with nats_errors("a message cannot be kept"):
            await self._msg.in_progress()

    async def discard(self) -> None:
        """Remove the message from the queue although its work was not done."""
        with nats_errors("a message cannot be discarded"):
            await self._msg.term()
