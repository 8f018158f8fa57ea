"""Leases that are no longer renewed: their workers are gone, and the server has not let them expire."""

import asyncio

from nats.js import JetStreamContext

from shared.clock import elapsed
from shared.device.lease import read_leases
from shared.device.lease_queue import STALE_TTLS
from shared.errors import Unavailable


class StaleLeases:
    """Known by their sequences, which stand still; like a contender this goes by a clock of its own."""

    def __init__(self, js: JetStreamContext, ttl: int, patience: float) -> None:
        """`ttl` of leases that do not tell theirs, and `patience` with NATS, in seconds."""
        self._js, self._ttl, self._patience = js, ttl, patience
        self._moved: dict[tuple[str, str, str, int], float] = {}  # by key and sequence: when it was seen first

    async def sentences(self) -> list[str]:
        """One about each stale lease; none when NATS does not answer."""
        try:
            async with asyncio.timeout(self._patience):
                leases = await read_leases(self._js)
        except (Unavailable, TimeoutError):
            self._moved = {}  # nor could anybody renew
            return []
        now = elapsed()
        keys = {(view.gpu, view.role, view.owner, view.fence): view for view in leases}
        self._moved = {key: self._moved.get(key, now) for key in keys}
        return [
            f"the lease of the {view.role} worker {view.owner} on {view.gpu} is no longer renewed: "
            "the next worker that waits for the device deletes it"
            for key, view in keys.items()
            if now - self._moved[key] > STALE_TTLS * max(self._ttl, view.ttl)
        ]
