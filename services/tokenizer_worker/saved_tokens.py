"""Saving of a song's tokens while they are made, so that the song can continue in any worker."""

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from shared.errors import JobConflict, ObjectError, Unavailable
from shared.jobs.store import JobStore, change
from shared.model.codec_windows import CodecWindows
from shared.schema.job import Job
from shared.storage.objects import ObjectStore, tokens_key
from shared.storage.token_file import TokenMeta, pack, unpack
from shared.tracing import span
from shared.worker.job_context import JobContext
from shared.worker.signals import JobStopped

log = logging.getLogger(__name__)


class SavedTokens:
    """The saved tokens of one song in one turn: one object, which is overwritten with more and more tokens.

    The record names it from the first save on; what an earlier turn saved is deleted then. How many tokens are saved
    is in the record for the codec, which decodes whole windows: it changes with each of them, and only if asked for.
    """

    def __init__(
        self,
        context: JobContext,
        jobs: JobStore,
        store: ObjectStore,
        model: str,
        windows: CodecWindows | None,
        on_saved: Callable[[], None],
    ) -> None:
        """`model` names the model that makes the tokens; `on_saved` is called after each save."""
        self.frames = 0  # that are saved by this turn
        self._context, self._jobs, self._store = context, jobs, store
        self._model, self._windows, self._on_saved = model, windows, on_saved
        self.key = tokens_key(context.job.job_id, context.turn.fencing_token)
        self._named = False  # the record names our object
        self._noted = 0  # whole windows of it that the record tells of
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

        Where more of the song is saved already, less of it is not written over that.
        Raises `JobStopped` or `JobConflict` when the song no longer belongs to this worker, `Unavailable`.
        """
        async with self._writing:
            if ended or codes.shape[1] > self.frames:
                await self._write(codes, ended)
        if not ended:
            await self.name_in_record()

    async def _write(self, codes: np.ndarray, ended: bool) -> None:
        job = self._context.job
        meta = TokenMeta(job_id=job.job_id, model=self._model, seed=job.request.seed or 0, ended=ended)
        with span("store tokens"):
            await self._store.put(self.key, pack(codes, meta))
        self.frames = codes.shape[1]
        self._on_saved()

    async def name_in_record(self) -> None:
        """Have the record name the saved tokens. Raises as `save` does."""
        if not self._named:
            await self._write_record()

    async def note_windows(self) -> Job | None:
        """Have the record tell of the whole windows that are saved. Raises as `save` does.

        Returns the record as it was written; None when it named them before.
        """
        if self._named and self._whole_windows() <= self._noted:
            return None
        return await self._write_record()

    async def _write_record(self) -> Job:
        windows, claimed = 0, self._context.job

        def name(job: Job) -> Job:
            nonlocal windows
            windows = self._whole_windows()  # as of this attempt: another write may have come in between
            if job.status != "generating" or job.fencing_token != self._context.turn.fencing_token:
                raise JobStopped(f"the song is {job.status} and no longer belongs to this worker")
            # It has got further: whatever happened before did not keep it from that.
            return change(job, tokens_key=self.key, attempts=0, saved_frames=self.frames if windows else None)

        job = await self._jobs.update(claimed.job_id, claimed.tenant, name)
        self._noted = max(windows, self._noted)
        if not self._named:
            self._named = True
            await self.delete_older()
        return job

    def _whole_windows(self) -> int:
        return self._windows.final(self.frames) if self._windows is not None else 0

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
