"""Removes the keys of candidates that are gone, where the server does not let them expire."""

import asyncio
import logging
from collections.abc import Callable

from nats.aio.client import Client
from nats.js import JetStreamContext

from shared.clock import elapsed
from shared.device.lease_key import delete_key
from shared.device.lease_queue import STREAM, LeaseQueue, LeaseView
from shared.errors import NotFound, Refused, Unavailable, WrongSequence
from shared.nats.errors import nats_errors

log = logging.getLogger(__name__)


class StaleKeyRemover:
    """Times every candidate's key; while we wait, looks after those ahead of us that stand still."""

    def __init__(
        self, queue: LeaseQueue, ttl: int, waiting_ticket: Callable[[], int], on_change: Callable[[], None]
    ) -> None:
        """`waiting_ticket` gives our ticket while we wait, else 0; `on_change` is called when the queue changed."""
        self._queue, self._ttl = queue, ttl
        self._waiting_ticket, self._on_change = waiting_ticket, on_change

    async def run(self, nc: Client, js: JetStreamContext) -> None:
        """Go on for ever."""
        while True:
            self._queue.tick(elapsed(), nc.is_connected)
            if ticket := self._waiting_ticket():
                await asyncio.gather(
                    *(
                        self._delete(js, subject, view) if stale else self._look_at(js, subject, view)
                        for subject, view, stale in self._queue.doubtful(ticket)
                    )
                )
            await asyncio.sleep(self._ttl / 8)

    async def _look_at(self, js: JetStreamContext, subject: str, view: LeaseView) -> None:
        """Ask the leader about a key: what follows can miss a change across a restart of the server."""
        try:
            with nats_errors("a lease cannot be read"):
                message = await js.get_msg(STREAM, subject=subject)
        except NotFound:
            self._queue.vanish(subject, view.sequence, elapsed())
        except Unavailable:
            return
        else:
            self._queue.observe(subject, message.seq or 0, message.data or b"", message.headers, elapsed())
        self._on_change()

    async def _delete(self, js: JetStreamContext, subject: str, view: LeaseView) -> None:
        """Delete a key whose owner is gone.

        To pass it over would not be safe: an owner that was stopped between looking at its deadline and writing renews
        when it wakes. It must meet the marker. So must the sequence be the one that was timed, and none read since.
        """
        try:
            await delete_key(js, subject, view.sequence, self._ttl / 4)
        except WrongSequence:
            self._queue.restart(subject, view.sequence)  # its owner moved it
            await self._look_at(js, subject, view)
        except Refused as error:
            log.warning("lease: the stale lease of %s on %s cannot be deleted: %s", view.owner, view.gpu, error)
        except Unavailable:
            return
        else:
            log.warning("lease: deleted the stale lease of %s on %s, which no longer moved", view.owner, view.gpu)
            self._queue.clear(subject, view.sequence)
            self._on_change()
