"""Saving of a song's tokens while they are made, so that the song can continue in any worker."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from services.tokenizer_worker.kept_tokens import load_kept
from shared.errors import JobConflict, ObjectError, Unavailable
from shared.jobs.store import JobStore, change
from shared.model.codec_windows import CodecWindows
from shared.schema.base import VERSION
from shared.schema.job import Job
from shared.storage.keys import tokens_key
from shared.storage.objects import ObjectStore
from shared.storage.token_file import EarlierWindow, TokenMeta, pack, unpack
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
        self._loaded = 0  # frames that the song had when this turn began
        self._counted = False  # the record says that this turn got the song further
        self._earlier: tuple[EarlierWindow, ...] = ()  # beside the song's tokens, in every file of them
        self._noted = 0  # whole windows of it that the record tells of
        self._writing = asyncio.Lock()
        self._latest: np.ndarray | None = None  # int16 [8, T] that waits to be saved
        self._saving: asyncio.Task[None] | None = None

    async def load(self) -> tuple[np.ndarray, bool]:
        """Load the tokens that the song has: int16 ``[8, T]``, T ≥ 0, and whether they are the whole song.

        They are those that earlier turns saved, unless these are damaged, missing or another model's. Then the song
        begins again: with the frames that it keeps of another song, if it goes on from one.
        Raises `SongError` where those are lost, and `Unavailable`.
        """
        job = self._context.job
        saved = await self._load_saved()
        if saved is not None:
            codes, meta = saved
            ended, self._earlier = meta.ended, meta.earlier
        elif job.parent is not None:
            codes, self._earlier = await load_kept(job, job.parent, self._jobs, self._store, self._windows)
            ended = False
        else:
            codes, ended = np.zeros((8, 0), np.int16), False
        self._loaded = codes.shape[1]
        return codes, ended

    async def _load_saved(self) -> tuple[np.ndarray, TokenMeta] | None:
        """Load what earlier turns saved; None where that cannot be used."""
        job = self._context.job
        if job.tokens_key is None:
            return None
        try:
            codes, meta = unpack(await self._store.get(job.tokens_key), job.job_id)
        except ObjectError as error:
            log.warning("%s: begins again, %s", job.job_id, error)
            return None
        if (meta.model, meta.seed) != (self._model, job.request.seed or 0):
            log.warning("%s: begins again, its saved tokens were made by %s", job.job_id, meta.model)
            return None
        if job.parent is not None and codes.shape[1] < job.parent.frames:
            log.warning("%s: begins again, its saved tokens are fewer than those that it keeps", job.job_id)
            return None
        return codes, meta

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
        meta = TokenMeta(
            job_id=job.job_id, model=self._model, seed=job.request.seed or 0, ended=ended, earlier=self._earlier
        )
        if ended:  # the file is kept
            meta = replace(meta, tags=job.request.tags, lyrics=job.request.lyrics, version=VERSION)
        with span("store tokens"):
            await self._store.put(self.key, pack(codes, meta))
        self.frames = codes.shape[1]
        self._on_saved()

    async def name_in_record(self) -> None:
        """Have the record name the saved tokens. Raises as `save` does."""
        if not self._named or (self.frames > self._loaded and not self._counted):
            await self._write_record()

    async def note_windows(self) -> Job | None:
        """Have the record tell of the whole windows that are saved. Raises as `save` does.

        Returns the record as it was written; None when it named them before.
        """
        if self._named and self._whole_windows() <= self._noted:
            return None
        return await self._write_record()

    async def _write_record(self) -> Job:
        windows, further, claimed = 0, False, self._context.job

        def name(job: Job) -> Job:
            nonlocal windows, further
            # As of this attempt: another write may have come in between.
            windows, further = self._whole_windows(), self.frames > self._loaded
            if job.status != "generating" or job.fencing_token != self._context.turn.fencing_token:
                raise JobStopped(f"the song is {job.status} and no longer belongs to this worker")
            # Where it has got further, whatever happened before did not keep it from that.
            attempts = 0 if further else job.attempts
            return change(job, tokens_key=self.key, attempts=attempts, saved_frames=self.frames if windows else None)

        job = await self._jobs.update(claimed.job_id, claimed.tenant, name)
        self._noted = max(windows, self._noted)
        self._counted = self._counted or further
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
