"""The songs that this worker gave the codec something of: whether one is listened to, and waits for the device."""

import logging
import math
import time
from collections import OrderedDict

from shared.errors import NewerRecord, Unavailable
from shared.jobs.store import JobStore
from shared.model.codec_windows import CodecWindows, can_be_decoded
from shared.schema.job import ENDED, Job
from shared.worker.listeners import Listeners

log = logging.getLogger(__name__)

_MOST_SONGS = 1000
_READ_SECONDS = 1.0  # for which what was read of a song is believed


class HandedOn:
    """Songs with windows that the codec can decode, so far as this worker made them. Only listened ones are read."""

    def __init__(self, windows: CodecWindows | None) -> None:
        self._windows = windows
        self._tenants: OrderedDict[str, str] = OrderedDict()  # by song, the latest last
        self._waits: dict[str, tuple[float, bool]] = {}  # by song: when it was read, and whether it waits

    def add(self, job: Job) -> None:
        """Note a song of which something can be decoded."""
        self._tenants[job.job_id] = job.tenant
        self._tenants.move_to_end(job.job_id)
        self._waits.pop(job.job_id, None)
        if len(self._tenants) > _MOST_SONGS:
            self._forget(next(iter(self._tenants)))

    async def dry_in(self, listeners: Listeners, jobs: JobStore, within: float) -> float | None:
        """Seconds until a listener runs dry who waits for the codec; None where none does within so many seconds.

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
            log.warning("%s: whether its listeners wait for the codec is not known: %s", job_id, error)
            return False
        if job is None or job.status in ENDED:
            self._forget(job_id)
            return False
        self._waits[job_id] = time.monotonic(), can_be_decoded(job, self._windows)
        return self._waits[job_id][1]

    def _forget(self, job_id: str) -> None:
        self._tenants.pop(job_id, None)
        self._waits.pop(job_id, None)
