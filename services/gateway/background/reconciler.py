"""The reconciler: repairs what crashes leave behind.

It deletes objects that no song needs, queues songs again that are in no queue and wait for no time, and renews records
that would expire before their song has ended. A recording is a song to it, but for what `needed_objects` says. Every
gateway runs one. What it deletes or queues it reads again just before; and when two reconcilers find the same song, the
queues, which take one message a song, let one of them queue it.
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
from nats.aio.client import Client
from nats.js.api import PubAck

from services.gateway.background.needed_objects import Keeping, owner_of
from services.gateway.monitoring.metrics import ReconcilerCounts
from shared.aio import end
from shared.errors import HeartMulaError, JobConflict, NotFound, QueueFull, Unreadable
from shared.jobs.claims import with_claim
from shared.jobs.queues import queue_decode, queue_recording, queue_tokens
from shared.jobs.scan import Record, scan
from shared.jobs.store import JobStore
from shared.nats.errors import nats_errors
from shared.nats.streams import DAY, JOB_TTL
from shared.nats.subjects import DEC, DEC_CONSUMERS, TOK, decode_subject, encode_subject
from shared.schema.decoding import read_order
from shared.schema.job import ENDED, DecodeJob, Job
from shared.settings import Settings
from shared.storage.objects import ObjectStore, StoredObject
from shared.storage.tempdirs import clear_scratch

log = logging.getLogger(__name__)

RENEW_AFTER = 3 * DAY  # records live for seven


@dataclass
class Reconciled:
    """Counts of what one round has repaired."""

    objects: int = 0  # deleted
    songs: int = 0  # queued again
    records: int = 0  # written again before they would expire

    def __str__(self) -> str:
        return f"{self.objects} objects deleted, {self.songs} songs queued again, {self.records} records renewed"


class Reconciler:
    """Reconciles at intervals, until it is closed."""

    def __init__(
        self, nc: Client, store: ObjectStore, settings: Settings, counts: ReconcilerCounts, keep: float = JOB_TTL
    ) -> None:
        """`counts` is kept up to date.

        Finished audio without a record is kept for `keep` seconds, and tokens beside it. Records expire after that
        time; one that is gone earlier was lost, and its audio must not be lost with it.
        """
        self._counts = counts
        self._nc, self._js, self._store = nc, nc.jetstream(timeout=5), store
        self._jobs = JobStore(self._js)
        self._pause, self._keeping = settings.sweep_seconds, Keeping(keep, settings.keep_tokens_seconds)
        self._scratch = settings.data_dir / "tmp"
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the first round follows after a pause."""
        self._task = asyncio.create_task(self._run(), name="reconciler")

    async def close(self) -> None:
        """Stop, in the middle of a round if need be."""
        if self._task is not None:
            await end(self._task)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._pause * random.uniform(0.5, 1.5))  # gateways that started together drift apart
            try:
                await self.reconcile()
            except HeartMulaError as error:
                self._counts.failures += 1
                log.warning("reconciling again later: %s", error)
            except Exception:
                self._counts.failures += 1
                log.exception("the reconciler met an unexpected error, its next round follows")

    async def reconcile(self) -> Reconciled:
        """Do one round. Raises `HeartMulaError` when a server does not answer."""
        done, before = Reconciled(), time.time() - self._pause
        await asyncio.to_thread(clear_scratch, self._scratch)  # of processes that were killed
        try:
            left = await self._old_objects(before)
            with nats_errors("job records cannot be read"):
                async with contextlib.aclosing(scan(self._js)) as records:
                    async for record in records:
                        objects = left.pop(record.job_id, [])
                        if record.job is not None:
                            # A record that was removed or changed meanwhile is being worked on: leave it alone.
                            with contextlib.suppress(JobConflict):
                                await self._reconcile_song(record, record.job, objects, before, done)
            for job_id, objects in left.items():
                with contextlib.suppress(JobConflict):
                    done.objects += await self._delete_unneeded(job_id, "*", objects)  # of any tenant
        finally:
            self._counts.rounds += 1
            self._counts.objects += done.objects
            self._counts.songs += done.songs
            self._counts.records += done.records
            if done != Reconciled():
                log.info("reconciled: %s", done)
        return done

    async def _reconcile_song(
        self, record: Record, job: Job, objects: list[StoredObject], before: float, done: Reconciled
    ) -> None:
        if not all(self._keeping.is_needed(job, item, objects) for item in objects):
            done.objects += await self._delete_unneeded(job.job_id, job.tenant, objects)
        if job.status in ENDED:
            return
        if not job.deferred and record.written < before and await self._queue_again(job):
            done.songs += 1
        if record.written < time.time() - RENEW_AFTER:
            await self._jobs.update(job.job_id, job.tenant, _unchanged)
            done.records += 1

    # --- objects

    async def _old_objects(self, before: float) -> dict[str, list[StoredObject]]:
        """Objects that are old enough to have been left behind, by song."""
        found: dict[str, list[StoredObject]] = {}
        for prefix in ("tokens/", "audio/", "recordings/"):
            for item in await self._store.list(prefix):
                if item.modified < before and (job_id := owner_of(item.key)) is not None:
                    found.setdefault(job_id, []).append(item)
        return found

    async def _delete_unneeded(self, job_id: str, tenant: str, objects: list[StoredObject]) -> int:
        """Delete the objects that the song does not need by its current record; returns how many."""
        ordered = {order.tokens_key for order in await self._decode_orders(job_id) if order is not None}
        job = await self._jobs.get(job_id, tenant)
        unwanted = job is None and await self._jobs.was_deleted(job_id, tenant)
        deleted = 0
        for item in objects:
            awaited = job is not None and job.status not in ENDED and item.key in ordered
            if unwanted or not (awaited or self._keeping.is_needed(job, item, objects)):
                await self._store.delete_one(item.key)
                deleted += 1
        return deleted

    async def _decode_orders(self, job_id: str) -> list[DecodeJob | None]:
        """The decode jobs of a song that wait or are in work, of both lanes; None for one that cannot be read.

        They may name other tokens than the record does by now.
        """
        found: list[DecodeJob | None] = []
        for lane in DEC_CONSUMERS:
            with contextlib.suppress(NotFound), nats_errors("the queue for audio cannot be read"):
                message = await self._js.get_msg(DEC, subject=decode_subject(job_id, lane))
                try:
                    found.append(read_order(message.subject or "", message.data or b"", DecodeJob))
                except Unreadable:
                    found.append(None)
        return found

    # --- songs

    async def _queue_again(self, job: Job) -> bool:
        """Queue a song that is in no queue. Returns whether it was queued.

        The queues are read before the record: workers put a song into the next queue, or end its record, before they
        remove it from the queue it was in. So a record that is still the same has no message under way.
        """
        encode = job.recording is not None
        queue, subject = (DEC, encode_subject(job.job_id)) if encode else (TOK, f"jobs.tok.*.{job.job_id}")
        with contextlib.suppress(NotFound), nats_errors("the queues cannot be read"):
            await self._js.get_msg(queue, subject=subject)
            return False
        for order in await self._decode_orders(job.job_id):
            if order is None or order.last or job.status == "decoding":  # others lead to no further tokens
                return False
        if await self._jobs.get(job.job_id, job.tenant) != job:
            return False
        if job.status == "decoding":
            if job.tokens_key and job.frames:
                return await _queued(job, queue_decode(self._nc, job, job.tokens_key, job.frames))
            # Its tokens are not known. The record first: a worker ignores a message whose song is in another state.
            await self._jobs.update(job.job_id, job.tenant, _from_the_beginning)
        return await _queued(job, queue_recording(self._nc, job) if encode else queue_tokens(self._nc, job))


async def _queued(job: Job, publishing: Coroutine[Any, Any, PubAck | None]) -> bool:
    try:
        if await publishing is None:  # another reconciler was quicker
            return False
    except QueueFull:  # the next round tries again
        return False
    log.warning("%s: was in no queue, queued again", job.job_id)
    return True


def _unchanged(job: Job) -> Job:
    """A copy of the record: it is written, and so lives longer, where the record itself would not be."""
    return job if job.status in ENDED else msgspec.structs.replace(job)


def _from_the_beginning(job: Job) -> Job:
    if job.status != "decoding":
        raise JobConflict(f"the song is {job.status} by now")
    return with_claim(
        job,
        "codec",
        claim={"fencing_token": None, "attempts": 0},
        status="queued",
        fencing_token=None,
        attempts=0,
        tokens_key=None,
        saved_frames=None,
        frames=None,
        remade=job.remade + 1,
    )
