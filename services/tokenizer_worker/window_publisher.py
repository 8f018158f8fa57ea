"""Puts a song whose tokens are still being made into the codec's queue, when `shared.worker.window_policy` says so."""

import asyncio
import contextlib
import logging

import numpy as np

from services.tokenizer_worker.batch import BatchedSong
from services.tokenizer_worker.saved_tokens import SavedTokens
from shared.errors import JobConflict, NotFound, ObjectError, QueueFull, Unavailable, WrongSequence
from shared.jobs.queues import queue_windows
from shared.model.codec_windows import CodecWindows
from shared.schema.job import Job
from shared.worker.handed_on import HandedOn
from shared.worker.job_context import JobContext
from shared.worker.signals import JobStopped
from shared.worker.window_policy import Publish, Windows, decide
from shared.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

# A server that does not answer, or not as needed: there is always a next time.
_TROUBLE = (Unavailable, NotFound, WrongSequence, TimeoutError, ObjectError, QueueFull)
_LOOK_SECONDS = 0.5  # between two looks at who listens
_AGAIN_SECONDS = 2.0  # likewise, after a server did not answer


class WindowPublisher:
    """Publishes the whole windows of one song in one turn.

    What is published was saved before, and the record tells of it. Without listeners nothing is saved for it, where
    models take turns: the first report of one makes up for that.
    """

    def __init__(
        self,
        context: JobContext,
        worker: WorkerContext,
        saved: SavedTokens,
        windows: CodecWindows,
        handed_on: HandedOn,
        before: np.ndarray,
    ) -> None:
        """`before` are the tokens with which the song goes on in this turn, int16 ``[8, T]``."""
        self._context, self._worker, self._saved = context, worker, saved
        self._windows, self._handed_on = windows, handed_on
        self._before = before
        self._batched: BatchedSong | None = None  # the song with all its frames, once one was made in this turn
        self._whole = windows.final(before.shape[1])  # windows of which all tokens are made
        self._decoded = context.job.decoded_windows  # windows of which the audio is stored, as far as is known
        self._published = (0, False)  # windows, and whether for a listener
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._closing = False
        self._task = asyncio.create_task(self._run())

    def made(self, batched: BatchedSong) -> None:
        """Note a further frame, in the engine's thread."""
        self._batched = batched
        whole = self._windows.final(len(batched.frames))
        if whole > self._whole:
            self._whole = whole
            self._loop.call_soon_threadsafe(self._wake.set)

    async def close(self) -> None:
        """Publish nothing more in the background. What is under way is awaited."""
        self._closing = True
        self._wake.set()
        await self._task

    async def leave(self) -> None:
        """Publish what waited for the song to leave the device. Its tokens are saved. Raises as `SavedTokens.save`."""
        job = await self._saved.note_windows()
        if job is not None and self._windows.final(job.saved_frames or 0):
            self._handed_on.add(job)
        try:
            await self._look(Publish.ON_LEAVING)
        except QueueFull as error:
            log.warning("%s: not queued for its first audio: %s", self._context.job.job_id, error)

    async def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            pause = _LOOK_SECONDS
            try:
                await self._look(Publish.NOW)
            except _TROUBLE as error:
                log.warning("%s: not queued for its first audio: %s", self._context.job.job_id, error)
                pause = _AGAIN_SECONDS
            except (JobStopped, JobConflict):
                self._context.stop()
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    async def _look(self, occasion: Publish) -> None:
        """Publish if the policy says so on this occasion, unless that was done for the same windows."""
        job_id, whole = self._context.job.job_id, self._whole
        dry_in = self._worker.listeners.dry_in(job_id)
        listened = dry_in is not None
        windows, for_listener = self._published
        if whole < windows or (whole == windows and for_listener >= listened):
            return
        waiting = Windows(waiting=whole - self._decoded, models_stay=self._worker.models_stay, dry_in=dry_in)
        decision = decide(waiting, self._worker.away())
        if decision not in (Publish.NOW, occasion):
            return
        job = await self._record(whole)
        self._decoded = job.decoded_windows
        if whole > self._decoded:
            await queue_windows(self._worker.nc, job, listened=listened)
            self._handed_on.add(job)
        self._published = (whole, listened)

    async def _record(self, whole: int) -> Job:
        """The record, which tells of so many windows that are saved."""
        if self._windows.final(self._saved.frames) < whole:
            codes = self._before if self._batched is None else self._batched.codes
            await self._saved.save(codes, ended=False)
        claimed = self._context.job
        job = await self._saved.note_windows() or await self._worker.jobs.get(claimed.job_id, claimed.tenant)
        if job is None:
            raise JobConflict("there is no record of this song")
        return job
