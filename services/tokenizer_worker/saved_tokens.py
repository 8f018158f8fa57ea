"""Saving of a song's tokens while they are made, so that the song can continue in any worker."""

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from shared.errors import JobConflict, ObjectError, Unavailable
from shared.jobs.store import JobStore, change
from shared.schema.job import Job
from shared.storage.objects import ObjectStore, tokens_key
from shared.storage.token_file import TokenMeta, pack, unpack
from shared.tracing import span
from shared.worker.job_context import JobContext
from shared.worker.signals import JobStopped

log = logging.getLogger(__name__)


class SavedTokens:
    """The saved tokens of one song in one turn: one object, which is overwritten with more and more tokens.

    The record names it from the first save on; what an earlier turn saved is deleted then.
    """

    def __init__(
        self, context: JobContext, jobs: JobStore, store: ObjectStore, model: str, on_saved: Callable[[], None]
    ) -> None:
        """`model` names the model that makes the tokens; `on_saved` is called after each save."""
        self._context, self._jobs, self._store = context, jobs, store
        self._model, self._on_saved = model, on_saved
        self.key = tokens_key(context.job.job_id, context.turn.fencing_token)
        self._named = False  # the record names our object
        self._writing = asyncio.Lock()
        self._latest: np.ndarray | None = None  # int16 [8, T] that waits to be saved
        self._saving: asyncio.Task[None] | None = None

    async def load(self) -> tuple[np.ndarray, bool]:
        """Load the tokens that earlier turns saved: int16 ``[8, T]``, T ≥ 0, and whether they are the whole song.

        Tokens that are damaged, missing or another model's are not used. Raises `Unavailable`.
        """
        job = self._context.job
        if job.tokens_key is not None:
            try:
                codes, meta = unpack(await self._store.get(job.tokens_key), job.job_id)
                if (meta.model, meta.seed) == (self._model, job.request.seed or 0):
                    return codes, meta.ended
                log.warning("%s: begins again, its saved tokens were made by %s", job.job_id, meta.model)
            except ObjectError as error:
                log.warning("%s: begins again, %s", job.job_id, error)
        return np.zeros((8, 0), np.int16), False

    def save_soon(self, codes: np.ndarray) -> None:
        """Save int16 `codes` ``[8, T]`` in the background; of several that wait only the latest are saved."""
        self._latest = codes
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save_waiting())

    async def _save_waiting(self) -> None:
        while self._latest is not None:
            codes, self._latest = self._latest, None
            try:
                await self.save(codes, ended=False)
            except (Unavailable, ObjectError) as error:
                log.warning("%s: not saved at frame %d: %s", self._context.job.job_id, codes.shape[1], error)
            except (JobStopped, JobConflict):
                self._context.stop()

    async def save(self, codes: np.ndarray, *, ended: bool) -> None:
        """Save int16 `codes` ``[8, T]`` now. Unless they are the whole song, the record names them too.

        Raises `JobStopped` or `JobConflict` when the song no longer belongs to this worker, `Unavailable`.
        """
        async with self._writing:
            job = self._context.job
            meta = TokenMeta(job_id=job.job_id, model=self._model, seed=job.request.seed or 0, ended=ended)
            with span("store tokens"):
                await self._store.put(self.key, pack(codes, meta))
        self._on_saved()
        if not ended:
            await self.name_in_record()

    async def name_in_record(self) -> None:
        """Write the key of the saved tokens into the record. Raises as `save` does."""
        if not self._named:
            job = self._context.job
            await self._jobs.update(job.job_id, job.tenant, self._name)
            self._named = True
            await self.delete_older()

    def _name(self, job: Job) -> Job:
        if job.status != "generating" or job.fencing_token != self._context.turn.fencing_token:
            raise JobStopped(f"the song is {job.status} and no longer belongs to this worker")
        # It has got further: whatever happened before did not keep it from that.
        return change(job, tokens_key=self.key, attempts=0)

    async def delete_older(self) -> None:
        """Delete the tokens that an earlier turn saved. A failure is only logged."""
        older = self._context.job.tokens_key
        if older is not None and older != self.key:
            try:
                await self._store.delete_one(older)
            except (Unavailable, ObjectError) as error:
                log.warning("%s was not deleted: %s", older, error)

    async def close(self) -> None:
        """Save nothing more in the background. A save under way is awaited: it must not overwrite what follows."""
        self._latest = None
        if self._saving is not None:
            await self._saving
