"""Storing of decoded recordings: audio, record and message, in this order, each only once it is durable.

The id and the keys of a recording follow from its bytes. So whatever an attempt has left behind is what the next upload
of the same file needs, and finds.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from nats.aio.client import Client

from services.gateway.submission.outage import Outage
from services.gateway.submission.rollback import withdraw
from shared.audio.forms import CONTENT_TYPES
from shared.causes import NO_ANSWER
from shared.errors import HeartMulaError, JobConflict, NewerRecord, ObjectError, Unavailable
from shared.jobs.queues import queue_recording
from shared.jobs.store import JobStore
from shared.nats.errors import nats_errors
from shared.nats.subjects import DEC, encode_subject
from shared.schema.job import Job
from shared.storage.objects import ObjectStore

log = logging.getLogger(__name__)

_CONFLICTS = 10  # in a row, after which a request is refused
_IN_VAIN = ("failed", "cancelled")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Stored:
    """A recording that is stored and queued, or was before."""

    job: Job
    is_new: bool


class RecordingStore:
    """Stores recordings and queues them for their tokens."""

    def __init__(self, nc: Client, jobs: JobStore, store: ObjectStore, outage: Outage) -> None:
        self._nc, self._js = nc, nc.jetstream(timeout=5)
        self._jobs, self._store, self._outage = jobs, store, outage

    async def find(self, tenant: str, recording_id: str) -> Job | None:
        """A recording that need not be stored again, which lives for a week from now; None where there is none.

        While a server is away for a short time it waits. Raises `Unavailable`, `QueueFull`, or `NewerRecord`.
        """
        return await self._patiently(lambda: self._find(tenant, recording_id))

    async def _find(self, tenant: str, recording_id: str) -> Job | None:
        job = await self._jobs.get(recording_id, tenant)
        if job is None or job.status in _IN_VAIN or not await self._is_there(job.audio_key):
            return None
        if job.status == "completed" and not await self._is_there(job.tokens_key):
            return None
        try:
            job = await self._jobs.update(recording_id, tenant, _written_again)
        except NewerRecord:
            raise
        except JobConflict:  # it has ended in vain, or was removed, meanwhile
            return None
        await self._queue(job)
        return job

    async def store(self, job: Job, flac: Path) -> Stored:
        """Store a new recording, unless the same one is there. While a server is away for a short time it waits.

        Raises `Unavailable`, `QueueFull`, or `NewerRecord`. Then nothing of it is left, as far as the servers answer;
        what is left because they do not, the reconciler deletes, and the next upload of the file takes it over.
        """
        try:
            return await self._patiently(lambda: self._attempt(job, flac))
        except BaseException:
            await asyncio.shield(self._roll_back(job, flac))
            raise

    async def _patiently(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        wait, conflicts = self._outage.begin_request(), 0
        while True:
            try:
                try:
                    async with wait.attempt():
                        return await attempt()
                except TimeoutError:
                    raise Unavailable("nats", f"NATS does not answer: {NO_ANSWER}") from None
            except NewerRecord:
                raise
            except JobConflict:  # the same recording is being stored or removed at this moment
                conflicts += 1
                if conflicts == _CONFLICTS:
                    raise Unavailable("nats", "the recording's record keeps changing; try again") from None
            except Unavailable as error:
                await wait.until_back(error)

    async def _attempt(self, job: Job, flac: Path) -> Stored:
        """Store audio, record and message. Raises `JobConflict` when the record came or went meanwhile."""
        await self._put(job, flac)
        try:
            await self._jobs.create_over(job, self._is_void)
        except NewerRecord:
            raise
        except JobConflict:  # another gateway's, or this one's after all
            known = await self._find(job.tenant, job.job_id)
            if known is None:
                raise
            return Stored(known, is_new=known.created_at == job.created_at)
        await self._queue(job)
        if not await self._is_there(job.audio_key):  # deleted with the record that this one has replaced
            await self._put(job, flac)
        return Stored(job, is_new=True)

    async def _put(self, job: Job, flac: Path) -> None:
        await self._store.put_file(job.audio_key or "", flac, CONTENT_TYPES["flac"])

    async def _queue(self, job: Job) -> None:
        """Queue a recording that waits. Where its message is there already, this changes nothing."""
        if job.status == "queued":
            await queue_recording(self._nc, job)

    async def _is_void(self, job: Job) -> bool:
        """Whether a record may be replaced: it ended in vain, or what it refers to is lost."""
        if job.status == "completed":
            return not await self._is_there(job.tokens_key)
        return job.status in _IN_VAIN

    async def _is_there(self, key: str | None) -> bool:
        with contextlib.suppress(ObjectError):
            return key is not None and bool(await self._store.stat(key))
        return False

    async def _roll_back(self, job: Job, flac: Path) -> None:
        """Remove what a refused request has stored, and no other request has found. Raises nothing."""
        try:
            with nats_errors("its record could not be removed"):
                await withdraw(self._js, job, DEC, encode_subject(job.job_id))
            if await self._jobs.get(job.job_id, job.tenant) is not None:
                return
            await self._store.delete_one(job.audio_key or "")
            if await self._jobs.get(job.job_id, job.tenant) is not None:  # another gateway has stored it meanwhile
                await self._put(job, flac)
        except HeartMulaError as error:
            log.warning("%s: some of it is left, although it was refused: %s", job.job_id, error)


def _written_again(job: Job) -> Job:
    """A copy of the record, so that it is written again. Raises `JobConflict` for one that ended in vain."""
    if job.status in _IN_VAIN:
        raise JobConflict(f"the recording is {job.status}")
    return msgspec.structs.replace(job)
