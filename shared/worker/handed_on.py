"""The songs that a worker handed to the other role: whether one is listened to, and waits for the device there."""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from shared.errors import NewerRecord, Unavailable
from shared.jobs.store import JobStore
from shared.schema.job import ENDED, Job
from shared.worker.listeners import Listeners

log = logging.getLogger(__name__)

_MOST_SONGS = 1000
_READ_SECONDS = 1.0  # for which what was read of a song is believed


class HandedOn:
    """Songs that the other role goes on with, so far as they came from this worker. Only listened ones are read."""

    def __init__(self, waits: Callable[[Job], bool]) -> None:
        """`waits` says of a record whether the song waits for the other role."""
        self._is_left = waits
        self._tenants: OrderedDict[str, str] = OrderedDict()  # by song, the latest last
        self._waits: dict[str, tuple[float, bool]] = {}  # by song: when it was read, and whether it waits

    def add(self, job: Job) -> None:
        """Note a song of which this worker has done what it could."""
        self._tenants[job.job_id] = job.tenant
        self._tenants.move_to_end(job.job_id)
        self._waits.pop(job.job_id, None)
        if len(self._tenants) > _MOST_SONGS:
            self._forget(next(iter(self._tenants)))

    async def dry_in(self, listeners: Listeners, jobs: JobStore, within: float) -> float | None:
        """Seconds until a listener runs dry who waits for the other role; None where none does within so many seconds.

        Where records cannot be read, no listener is known to wait.
        """
        found = [(dry_in, job_id) for job_id in self._tenants if (dry_in := listeners.dry_in(job_id)) is not None]
        for dry_in, job_id in sorted(found):
            if dry_in > within:
                return None
            if await self._is_waiting(job_id, jobs):
                return dry_in
        return None

    async def _is_waiting(self, job_id: str, jobs: JobStore) -> bool:
        read, waits = self._waits.get(job_id, (-math.inf, False))
        if time.monotonic() - read < _READ_SECONDS:
            return waits
        try:
            job = await jobs.get(job_id, self._tenants[job_id])
        except (Unavailable, NewerRecord) as error:
            log.warning("%s: whether its listeners wait for the other model is not known: %s", job_id, error)
            return False
        if job is None or job.status in ENDED:
            self._forget(job_id)
            return False
        self._waits[job_id] = time.monotonic(), self._is_left(job)
        return self._waits[job_id][1]

    def _forget(self, job_id: str) -> None:
        self._tenants.pop(job_id, None)
        self._waits.pop(job_id, None)
