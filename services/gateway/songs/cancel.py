"""Cancelling of songs that wait or run, and removal of songs that have ended."""

import logging

import msgspec

from services.gateway.errors import ApiError
from services.gateway.songs.status import Songs
from services.gateway.tasks import BackgroundTasks
from shared.errors import HeartMulaError
from shared.jobs.events import EventPublisher
from shared.jobs.store import JobStore, change
from shared.nats.connection import Connection
from shared.nats.errors import nats_errors
from shared.nats.streams import purge_job
from shared.nats.subjects import cancel_subject
from shared.schema.event import Cancelled
from shared.schema.job import ENDED, Job, Status
from shared.storage.keys import song_prefixes
from shared.storage.objects import ObjectStore

log = logging.getLogger(__name__)


class CancelledBody(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a cancellation or a removal."""

    job_id: str
    status: Status


class Canceller:
    """Cancels and removes the songs of tenants. Methods raise `Unavailable` when NATS or the store does not answer."""

    def __init__(
        self,
        nc: Connection,
        songs: Songs,
        jobs: JobStore,
        events: EventPublisher,
        store: ObjectStore,
        tasks: BackgroundTasks,
    ) -> None:
        self._nc, self._js = nc, nc.jetstream(timeout=5)
        self._songs, self._jobs, self._events = songs, jobs, events
        self._store, self._tasks = store, tasks

    async def cancel(self, tenant: str, job_id: str) -> CancelledBody:
        """Cancel a song, queued or running. Raises a 404 or 409 `ApiError`."""
        before = await self._songs.find(tenant, job_id)

        def decide(job: Job) -> Job:
            nonlocal before
            before = job
            if job.status == "cancelled":
                return job
            if job.status in ("completed", "failed"):
                raise ApiError(
                    409, "conflict", f"the song is {job.status}; only one that has not ended can be cancelled"
                )
            return change(job, status="cancelled")

        job = await self._jobs.update(job_id, tenant, decide)
        # The song is cancelled from here on, whatever else fails: workers look at the record.
        try:
            with nats_errors("cancelled, but its messages were not removed"):
                await self._nc.publish(cancel_subject(job_id))
                await purge_job(self._js, job_id)
        except HeartMulaError as error:
            log.warning("%s: %s", job_id, error)
        if before.status != "cancelled":
            log.info("%s: cancelled", job_id)
            progress = await self._songs.last_progress(job)
            await self._events.publish(tenant, Cancelled(job_id=job_id, status="cancelled", progress=progress))
        self._tasks.spawn(self._delete_objects(job_id))
        return CancelledBody(job_id=job_id, status=job.status)

    async def remove(self, tenant: str, job_id: str) -> CancelledBody:
        """Remove a song that has ended, its audio and its record. Raises a 404 or 409 `ApiError`.

        The audio goes first: where the store does not answer, the song is still there to be removed later.
        """
        job = await self._songs.find(tenant, job_id)
        if job.status not in ENDED:
            raise ApiError(409, "conflict", f"the song is {job.status}; cancel it before it is removed")
        for prefix in song_prefixes(job_id):
            await self._store.delete(prefix)
        await self._jobs.delete(job)
        log.info("%s: removed", job_id)
        return CancelledBody(job_id=job_id, status=job.status)

    async def _delete_objects(self, job_id: str) -> None:
        for prefix in song_prefixes(job_id):
            try:
                await self._store.delete(prefix)
            except HeartMulaError as error:
                log.warning("%s: cancelled, but the objects under %s were not deleted: %s", job_id, prefix, error)
