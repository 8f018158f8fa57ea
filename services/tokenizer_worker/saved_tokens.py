"""Saving a song's tokens while they are made, so that it can go on elsewhere after anything."""

import asyncio
import logging
from typing import TYPE_CHECKING

import numpy as np

from shared.errors import JobConflict, ObjectError, Unavailable
from shared.jobs.store import change
from shared.schema.job import Job
from shared.storage.objects import tokens_key
from shared.storage.token_file import TokenMeta, pack, unpack
from shared.tracing import span
from shared.worker.job_context import JobContext, JobStopped

if TYPE_CHECKING:
    from shared.worker.process import Worker

log = logging.getLogger(__name__)


class SavedTokens:
    """The saved tokens of one song in one turn: one object, written again and again.

    The record names it from the first time on; what an earlier turn saved is deleted then.
    """

    def __init__(self, delivery: JobContext, worker: "Worker", model: str) -> None:
        self._delivery, self._worker = delivery, worker
        self._model = model
        self.key = tokens_key(delivery.job.job_id, delivery.turn.fencing_token)
        self._named = False  # the record names our object
        self._writing = asyncio.Lock()
        self._latest: np.ndarray | None = None
        self._saving: asyncio.Task[None] | None = None

    async def latest(self) -> tuple[np.ndarray, bool]:
        """What earlier turns saved: int16 ``[8, T]``, T ≥ 0, and whether that is the whole song.

        Tokens that are damaged, gone or another model's are not used. Raises `Unavailable`.
        """
        job = self._delivery.job
        if job.tokens_key is not None:
            try:
                codes, meta = unpack(await self._worker.store.get(job.tokens_key), job.job_id)
                if (meta.model, meta.seed) == (self._model, job.request.seed or 0):
                    return codes, meta.ended
                log.warning("%s: begins again, its tokens are those of %s", job.job_id, meta.model)
            except ObjectError as error:
                log.warning("%s: begins again, %s", job.job_id, error)
        return np.zeros((8, 0), np.int16), False

    def offer(self, codes: np.ndarray) -> None:
        """Save these tokens in the background; of several that wait only the latest is saved."""
        self._latest = codes
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save_offered())

    async def _save_offered(self) -> None:
        while self._latest is not None:
            codes, self._latest = self._latest, None
            try:
                await self.save(codes, ended=False)
            except (Unavailable, ObjectError) as error:
                log.warning("%s: not saved at frame %d: %s", self._delivery.job.job_id, codes.shape[1], error)
            except (JobStopped, JobConflict):
                self._delivery.stop()

    async def save(self, codes: np.ndarray, *, ended: bool) -> None:
        """Save tokens now. Unless they are the whole song, the record names them too.

        Raises `JobStopped` or `JobConflict` when the song is no longer ours, `Unavailable`.
        """
        async with self._writing:
            job = self._delivery.job
            meta = TokenMeta(job_id=job.job_id, model=self._model, seed=job.request.seed or 0, ended=ended)
            with span("store tokens"):
                await self._worker.store.put(self.key, pack(codes, meta))
        self._worker.moved()
        if not ended:
            await self.name()

    async def name(self) -> None:
        """Let the record name what was saved. Raises as `save` does."""
        if not self._named:
            job = self._delivery.job
            await self._worker.jobs.update(job.job_id, job.tenant, self._name)
            self._named = True
            await self.forget_older()

    def _name(self, job: Job) -> Job:
        if job.status != "generating" or job.fencing_token != self._delivery.turn.fencing_token:
            raise JobStopped(f"the song is {job.status} and no longer ours")
        # It has got further: whatever happened before did not keep it from that.
        return change(job, tokens_key=self.key, attempts=0)

    async def forget_older(self) -> None:
        """Delete what an earlier turn saved."""
        older = self._delivery.job.tokens_key
        if older is not None and older != self.key:
            try:
                await self._worker.store.delete_one(older)
            except (Unavailable, ObjectError) as error:
                log.warning("%s was not deleted: %s", older, error)

    async def close(self) -> None:
        """Save nothing more in the background. What is on its way has to arrive: it must not overwrite what follows."""
        self._latest = None
        if self._saving is not None:
            await self._saving
