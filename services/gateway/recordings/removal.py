"""Removal of recordings, whatever their state."""

import logging

from services.gateway.errors import unknown_recording
from services.gateway.recordings.status import Recordings
from shared.errors import HeartMulaError, JobConflict, NewerRecord
from shared.jobs.store import JobStore, change
from shared.nats.connection import Connection
from shared.nats.errors import nats_errors
from shared.nats.streams import purge_job
from shared.nats.subjects import cancel_subject
from shared.schema.job import ENDED, Job
from shared.storage.keys import prefixes
from shared.storage.objects import ObjectStore

log = logging.getLogger(__name__)


class RecordingRemoval:
    """Removes the recordings of tenants. Songs that go on from them have frames of their own, and are left whole."""

    def __init__(self, nc: Connection, recordings: Recordings, jobs: JobStore, store: ObjectStore) -> None:
        self._nc, self._js = nc, nc.jetstream(timeout=5)
        self._recordings, self._jobs, self._store = recordings, jobs, store

    async def remove(self, tenant: str, recording_id: str) -> None:
        """Remove a recording, its audio and its record, and stop its encoding.

        The audio goes before the record: where the store does not answer, the recording is still there to be removed
        later. Raises a 404 `ApiError`, or `Unavailable` when NATS or the store does not answer.
        """
        job = await self._recordings.find(tenant, recording_id)
        if job.status not in ENDED:
            await self._cancel(job)
        for prefix in prefixes(job):
            await self._store.delete(prefix)
        await self._jobs.delete(job)
        log.info("%s: removed", recording_id)

    async def _cancel(self, job: Job) -> None:
        try:
            await self._jobs.update(job.job_id, job.tenant, _cancelled)
        except NewerRecord:
            raise
        except JobConflict:
            raise unknown_recording() from None
        # It is cancelled from here on, whatever else fails: workers look at the record.
        try:
            with nats_errors("its messages were not removed"):
                await self._nc.publish(cancel_subject(job.job_id))
                await purge_job(self._js, job.job_id)
        except HeartMulaError as error:
            log.warning("%s: %s", job.job_id, error)


def _cancelled(job: Job) -> Job:
    return job if job.status in ENDED else change(job, status="cancelled")
