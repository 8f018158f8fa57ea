"""Stale leases: workers that are gone no longer renew them, and the server has not let them expire."""

import asyncio

from nats.js import JetStreamContext

from shared.clock import elapsed
from shared.device.lease import read_leases
from shared.device.lease_queue import STALE_TTLS
from shared.errors import Unavailable


class StaleLeases:
    """Finds leases whose sequence has stopped changing, by this process's own clock, as candidates for the lease do."""

    def __init__(self, js: JetStreamContext, ttl: int, patience: float) -> None:
        """`ttl` is that of leases that do not name theirs, `patience` how long to wait for NATS, both in seconds."""
        self._js, self._ttl, self._patience = js, ttl, patience
        self._first_seen: dict[tuple[str, str, str, int], float] = {}  # by key and sequence; seconds

    async def sentences(self) -> list[str]:
        """Sentences, one about each stale lease; none when NATS does not answer."""
        try:
            async with asyncio.timeout(self._patience):
                leases = await read_leases(self._js)
        except (Unavailable, TimeoutError):
            self._first_seen = {}  # no worker could renew its lease either
            return []
        now = elapsed()
        keys = {(view.gpu, view.role, view.owner, view.sequence): view for view in leases}
        self._first_seen = {key: self._first_seen.get(key, now) for key in keys}
        return [
            f"the lease of the {view.role} worker {view.owner} on {view.gpu} is no longer renewed: "
            "the next worker that waits for the device deletes it"
            for key, view in keys.items()
            if now - self._first_seen[key] > STALE_TTLS * max(self._ttl, view.ttl)
        ]
