"""A recording's tokens in the object store, and what its record says of them.

Both objects have names that follow from the recording and the encoder alone, so what one turn stored, the next one
finds, and a stale one writes nothing else there.
"""

import logging
from collections.abc import Callable

import numpy as np

from services.codec_worker.encoder.chunks import FRAMES
from shared.errors import NewerRecord, ObjectError, Unavailable
from shared.jobs.store import change
from shared.schema.base import VERSION
from shared.schema.job import ENDED, Job
from shared.storage.keys import recording_part_key, recording_tokens_key
from shared.storage.token_file import TokenMeta, pack, unpack
from shared.tracing import span
from shared.worker.job_context import JobContext
from shared.worker.signals import JobStopped
from shared.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

_NONE = np.zeros((8, 0), np.int16)


class RecordingTokens:
    """The tokens of one recording in one turn.

    Methods that write raise `JobStopped` when the recording no longer belongs to this turn, `JobConflict` when it has
    no record, and `Unavailable`.
    """

    def __init__(self, context: JobContext, worker: WorkerContext, identity: str) -> None:
        """`identity` is the encoder's."""
        job = context.job
        assert job.recording is not None
        self._context, self._worker, self._identity = context, worker, identity
        self._key = recording_tokens_key(job.tenant, job.recording.sha256, identity)
        self._part = recording_part_key(self._key)

    async def made_before(self) -> np.ndarray | None:
        """All codes, int16 ``[8, T]``, where this recording was encoded before; else None. Raises `Unavailable`."""
        codes, ended = await self._read(self._key)
        return codes if ended and codes.shape[1] else None

    async def begun(self, frames: int) -> np.ndarray:
        """The codes of the first chunks that earlier turns stored, int16 ``[8, T]``, of so many `frames` in all.

        Raises `Unavailable`.
        """
        codes, _ = await self._read(self._part)
        whole = codes.shape[1] % FRAMES == 0 and codes.shape[1] < frames
        return codes if whole else _NONE

    async def _read(self, key: str) -> tuple[np.ndarray, bool]:
        """The codes of an object, and whether they are all; no codes where there is none that can be used."""
        job_id = self._context.job.job_id
        try:
            data = await self._worker.retry(lambda: self._worker.store.get(key))
        except ObjectError:  # there is none
            return _NONE, False
        try:
            codes, meta = unpack(data, job_id)
        except ObjectError as error:
            log.warning("%s: encoded again, %s", job_id, error)
            return _NONE, False
        if meta.model != self._identity or codes.shape[0] != _NONE.shape[0]:
            log.warning("%s: encoded again, its tokens were made by %s", job_id, meta.model)
            return _NONE, False
        return codes, meta.ended

    async def save(self, codes: np.ndarray) -> None:
        """Store the codes of the first chunks, and have the record tell of them."""

        def saved(record: Job) -> Job:
            self._require(record)
            # It has got further: whatever happened before did not keep it from that.
            return change(record, saved_frames=codes.shape[1], attempts=0)

        await self._put(self._part, codes, ended=False)
        await self._update(saved)
        self._worker.count_progress()

    async def save_all(self, codes: np.ndarray) -> None:
        """Store all codes."""
        await self._put(self._key, codes, ended=True)

    async def complete(self, frames: int) -> None:
        """Complete the recording, whose codes are stored."""
        key = self._key

        def completed(record: Job) -> Job:
            if record.status == "completed" and record.tokens_key == key:  # written before, the answer got lost
                return record
            self._require(record)
            return change(record, status="completed", tokens_key=key, frames=frames, error=None)

        await self._update(completed)
        try:
            await self._worker.store.delete_one(self._part)
        except Unavailable as error:
            log.warning("%s was not deleted: %s", self._part, error)

    async def _update(self, decide: Callable[[Job], Job]) -> None:
        job = self._context.job
        await self._worker.retry(lambda: self._worker.jobs.update(job.job_id, job.tenant, decide))

    async def _put(self, key: str, codes: np.ndarray, *, ended: bool) -> None:
        job_id, version = self._context.job.job_id, VERSION if ended else ""
        data = pack(codes, TokenMeta(job_id=job_id, model=self._identity, seed=0, ended=ended, version=version))
        with span("store tokens"):
            await self._worker.retry(lambda: self._worker.store.put(key, data), self._context)

    async def clear_away(self) -> None:
        """Delete what nothing needs any more of a recording that is not this turn's. A failure is only logged."""
        job = self._context.job
        try:
            now = await self._worker.jobs.get(job.job_id, job.tenant)
            if now is None or now.status in ENDED:
                await self._worker.store.delete_one(self._part)
            if now is None:
                await self._worker.store.delete_one(self._key)
        except (Unavailable, NewerRecord) as error:
            log.warning("%s: its tokens were not deleted: %s", job.job_id, error)

    def _require(self, record: Job) -> None:
        if record.status != "generating" or not self._context.holds(record):
            raise JobStopped(f"the recording is {record.status} and no longer belongs to this worker")
