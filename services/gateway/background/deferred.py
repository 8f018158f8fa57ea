"""Deferred songs: those that are to be queued at a time of their own.

Such a song is its record alone, and in no queue; so it is no work that waits for workers, and as durable as any other
song. Every gateway follows the records, knows those that are deferred, and queues each one when its time has come. The
message is published before the record says that the song waits for its time no longer: a gateway that dies in between
leaves a record by which another one publishes again, and the queue takes one message a song. A gateway that comes so
late that the message was taken already adds one that workers drop, because the record says more by then.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from nats.aio.client import Client

from services.gateway.errors import ApiError
from services.gateway.songs.eta import EtaEstimator
from services.gateway.songs.index import SongIndex
from shared.aio import end
from shared.errors import HeartMulaError, JobConflict, NewerRecord
from shared.jobs.events import EventPublisher
from shared.jobs.queues import queue_tokens
from shared.jobs.store import JobStore, released
from shared.nats.streams import purge_job
from shared.schema.event import Queued
from shared.schema.job import ENDED, Job

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5  # between two looks for songs whose time has come
_RETRY_SECONDS = 60  # Retry-After where as many songs wait for their time as may


class TooManyDeferred(ApiError):
    """As many songs wait for their time as may. Those that are to be queued at once need not wait for that."""

    def __init__(self, limit: int) -> None:
        """`limit` songs may wait."""
        words = f"as many songs wait for their time as may, {limit}: cancel one, or leave not_before out"
        super().__init__(429, "queue-full", words, headers={"Retry-After": str(_RETRY_SECONDS)})


class DeferredSongs:
    """Queues deferred songs when their time has come, until it is closed."""

    def __init__(
        self,
        nc: Client,
        jobs: JobStore,
        song_index: SongIndex,
        events: EventPublisher,
        eta: EtaEstimator,
        limit: int,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """At most `limit` songs may be deferred at once."""
        self._nc, self._js, self._jobs, self._index, self._limit = nc, nc.jetstream(timeout=5), jobs, song_index, limit
        self._events, self._eta, self._spawn = events, eta, spawn
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for songs whose time has come."""
        self._task = asyncio.create_task(self._run(), name="deferred-songs")

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            await end(self._task)

    async def require_room(self, count: int) -> None:
        """Raise `TooManyDeferred` where so many further songs may not be deferred. Raises `Unavailable`."""
        if await self._index.count_deferred() + count > self._limit:
            raise TooManyDeferred(self._limit)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._queue_due()
            except HeartMulaError as error:  # a server is away, or the queue is full: the next look tries again
                log.debug("deferred songs are queued later: %s", error)
            except Exception:
                log.exception("deferred songs met an unexpected error, the next look follows")

    async def _queue_due(self) -> None:
        """Queue the songs whose time has come, the earliest first. Raises `QueueFull` or `Unavailable`."""
        for tenant, job_id in self._index.due(time.time()):
            with contextlib.suppress(NewerRecord):  # a newer gateway's to queue
                await self._queue(tenant, job_id)

    async def _queue(self, tenant: str, job_id: str) -> None:
        job = await self._jobs.get(job_id, tenant)
        if job is None:
            self._index.forget(job_id)
        if job is None or not job.deferred:  # the index will know in a moment
            return
        ack = await queue_tokens(self._nc, released(job))
        try:
            job = await self._jobs.update(job_id, tenant, _released)
        except NewerRecord:  # a newer worker has it already
            raise
        except JobConflict:  # removed meanwhile
            await purge_job(self._js, job_id)
            return
        if job.status in ENDED:  # cancelled, or made already: its message was removed before this one came
            await purge_job(self._js, job_id)
        elif ack is not None and job.status == "queued":
            log.info("%s: its time has come, queued", job_id)
            self._spawn(self._announce(job, ack.seq))

    async def _announce(self, job: Job, sequence: int) -> None:
        """Publish that a song is in the queue now, and where."""
        expected = await self._eta.estimate_accepted(job, sequence)
        event = Queued(
            job_id=job.job_id, status="queued", progress=0, queue_position=expected.position, eta=expected.eta
        )
        await self._events.publish(job.tenant, event)


def _released(job: Job) -> Job:
    return released(job) if job.deferred else job
