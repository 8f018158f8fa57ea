"""Finds what crashes left behind: objects that nobody needs, songs that no queue knows, records about to expire.

Every gateway sweeps. Nothing here trusts what it read a while ago: whatever is about to be deleted or queued is looked
at again, and two sweepers that find the same are held apart by the queues, which take one message a song.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
import nats
from nats.aio.client import Client
from nats.js.api import PubAck
from nats.js.errors import APIError, NotFoundError

from services.gateway.monitoring.metrics import ReconcilerCounts
from shared.aio import end
from shared.causes import why
from shared.errors import HeartMulaError, JobConflict, QueueFull, Unreadable
from shared.jobs.queues import queue_decode, queue_tokens
from shared.jobs.scan import Record, scan
from shared.jobs.store import JobStore, change
from shared.nats.streams import DAY, JOB_TTL
from shared.nats.subjects import DEC, TOK, decode_subject
from shared.schema.base import JOB_ID
from shared.schema.decoding import read_order
from shared.schema.job import ENDED, DecodeJob, Job
from shared.settings import Settings
from shared.storage.objects import ObjectStore, StoredObject, belonging

log = logging.getLogger(__name__)

RENEW_AFTER = 3 * DAY  # records live for seven
_SERVER_ERRORS = (HeartMulaError, nats.errors.Error, APIError, TimeoutError, OSError)


@dataclass
class Swept:
    """What one round did."""

    objects: int = 0  # deleted
    songs: int = 0  # queued again
    records: int = 0  # written again before they would expire

    def __str__(self) -> str:
        return f"{self.objects} objects deleted, {self.songs} songs queued again, {self.records} records renewed"


class Reconciler:
    """Sweeps now and then, until it is closed."""

    def __init__(
        self, nc: Client, store: ObjectStore, settings: Settings, counts: ReconcilerCounts, keep: float = JOB_TTL
    ) -> None:
        """`counts` is kept up to date.

        Audio whose record is gone is kept for `keep` seconds: records expire then, and one that is gone before was
        lost, which must not cost the song too.
        """
        self._counts = counts
        self._nc, self._js, self._store = nc, nc.jetstream(timeout=5), store
        self._jobs = JobStore(self._js)
        self._pause, self._keep = settings.sweep_seconds, keep
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, after a pause."""
        self._task = asyncio.create_task(self._run(), name="sweeper")

    async def close(self) -> None:
        """Stop, whatever is being done."""
        if self._task is not None:
            await end(self._task)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._pause * random.uniform(0.5, 1.5))  # several gateways started together
            try:
                await self.sweep()
            except _SERVER_ERRORS as error:
                self._counts.failures += 1
                log.warning("sweeping again later: %s", why(error))
            except Exception:
                self._counts.failures += 1
                log.exception("unexpected")

    async def sweep(self) -> Swept:
        """One round. Raises what the servers' clients raise when one does not answer."""
        done, before = Swept(), time.time() - self._pause
        try:
            left = await self._old_objects(before)
            async with contextlib.aclosing(scan(self._js)) as records:
                async for record in records:
                    objects = left.pop(record.job_id, [])
                    if record.job is not None:
                        # A record that is gone, or changes all the time, is somebody else's care.
                        with contextlib.suppress(JobConflict):
                            await self._song(record, record.job, objects, before, done)
            for job_id, objects in left.items():
                with contextlib.suppress(JobConflict):
                    done.objects += await self._clear(job_id, "*", objects)  # of whichever tenant
        finally:
            self._counts.rounds += 1
            self._counts.objects += done.objects
            self._counts.songs += done.songs
            self._counts.records += done.records
            if done != Swept():
                log.info("swept: %s", done)
        return done

    async def _song(self, record: Record, job: Job, objects: list[StoredObject], before: float, done: Swept) -> None:
        if not all(self._needed(job, item) for item in objects):
            done.objects += await self._clear(job.job_id, job.tenant, objects)
        if job.status in ENDED:
            return
        if record.written < before and await self._queue_again(job):
            done.songs += 1
        if record.written < time.time() - RENEW_AFTER:
            await self._jobs.update(job.job_id, job.tenant, _as_it_is)
            done.records += 1

    # --- objects

    async def _old_objects(self, before: float) -> dict[str, list[StoredObject]]:
        """Objects that are old enough to be left over, by song."""
        found: dict[str, list[StoredObject]] = {}
        for prefix in ("tokens/", "audio/"):
            for item in await self._store.list(prefix):
                _, job_id, *name = item.key.split("/")
                if item.modified < before and len(name) == 1 and JOB_ID.fullmatch(job_id):  # others are not ours
                    found.setdefault(job_id, []).append(item)
        return found

    async def _clear(self, job_id: str, tenant: str, objects: list[StoredObject]) -> int:
        """Delete what the song does not need by its record of this moment; returns how many."""
        ordered = await self._ordered_tokens(job_id)
        job = await self._jobs.get(job_id, tenant)
        unwanted = job is None and await self._jobs.was_deleted(job_id, tenant)
        deleted = 0
        for item in objects:
            awaited = job is not None and job.status not in ENDED and item.key == ordered
            if unwanted or not (awaited or self._needed(job, item)):
                await self._store.delete_one(item.key)
                deleted += 1
        return deleted

    async def _ordered_tokens(self, job_id: str) -> str | None:
        """The tokens that a waiting decode job names: its record may have gone on to other ones."""
        try:
            message = await self._js.get_msg(DEC, subject=decode_subject(job_id))
            return read_order(message.subject or "", message.data or b"", DecodeJob).tokens_key
        except (NotFoundError, Unreadable):
            return None

    def _needed(self, job: Job | None, item: StoredObject) -> bool:
        """Whether an object has any use, by its song's record."""
        if job is None:
            return item.key.startswith("audio/") and item.modified > time.time() - self._keep
        if job.status in ("failed", "cancelled"):
            return False
        if job.status == "completed":
            return job.audio_key is not None and item.key in belonging(job.audio_key)
        name = item.key.rpartition("/")[2].partition(".")[0]
        return item.key == job.tokens_key or name == str(job.fence)

    # --- songs

    async def _queue_again(self, job: Job) -> bool:
        """Put a song into its queue when it is in none. Returns whether it was put there.

        The queues are looked at before the record: workers hand a song on to the next queue, or end its record,
        before they take it out of the one it was in. So a record that is still the same has no message under way.
        """
        for stream, subject in ((TOK, f"jobs.tok.*.{job.job_id}"), (DEC, decode_subject(job.job_id))):
            with contextlib.suppress(NotFoundError):
                await self._js.get_msg(stream, subject=subject)
                return False
        if await self._jobs.get(job.job_id, job.tenant) != job:
            return False
        if job.status == "decoding":
            if job.tokens_key and job.frames:
                return await _queued(job, queue_decode(self._nc, job, job.tokens_key, job.frames))
            # Nobody knows its tokens. Were the message first, a worker would find a song that is not for it.
            await self._jobs.update(job.job_id, job.tenant, _from_the_beginning)
        return await _queued(job, queue_tokens(self._nc, job))


async def _queued(job: Job, putting: Coroutine[Any, Any, PubAck | None]) -> bool:
    try:
        if await putting is None:  # another sweeper was quicker
            return False
    except QueueFull:  # next time
        return False
    log.warning("%s: was in no queue, queued again", job.job_id)
    return True


def _as_it_is(job: Job) -> Job:
    """A copy, which is written; the record itself would not be."""
    return job if job.status in ENDED else msgspec.structs.replace(job)


def _from_the_beginning(job: Job) -> Job:
    if job.status != "decoding":
        raise JobConflict(f"the song is {job.status} by now")
    return change(job, status="queued", fence=None, attempts=0, tokens_key=None, frames=None, remade=job.remade + 1)
