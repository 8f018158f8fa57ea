"""Continuous batching: songs join and leave the batch between two steps of the engine."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from services.tokenizer_worker.engines.base import PARKED_SECONDS, Song, TokenEngine
from shared.errors import DeviceBroken, DeviceFull
from shared.worker.job_context import JobContext
from shared.worker.signals import Paused
from shared.worker.throughput import Throughput

log = logging.getLogger(__name__)


@dataclass(eq=False)
class BatchedSong:
    """A song in the batch, with the frames made so far."""

    context: JobContext
    song: Song
    future: "asyncio.Future[None]"  # done when the song has left the batch
    on_frame: Callable[["BatchedSong"], None]  # called in the engine's thread
    frames: list[np.ndarray]  # int16 [8] each, those made before included
    resumed: int  # frames made before
    returns: Callable[[], bool]  # whether this worker may get it again after a pause; called in the engine's thread
    finished: bool = False  # it has left the batch

    @property
    def codes(self) -> np.ndarray:
        """All frames, int16 ``[8, T]``."""
        frames = self.frames[:]  # from the event loop, while the engine's thread adds more
        return np.stack(frames, axis=1) if frames else np.zeros((8, 0), np.int16)

    @property
    def job_id(self) -> str:
        """Id of the song, for the engine too."""
        return self.context.job.job_id

    @property
    def made(self) -> int:
        """Frames that were made for this song, in whatever turn: those that it took over from another one are not."""
        parent = self.context.job.parent
        return len(self.frames) - (parent.frames if parent else 0)

    @property
    def cache_label(self) -> str:
        """Label of its caches in the device's ledger."""
        return f"kv-cache {self.job_id}"

    def finish(self, error: Exception | None) -> None:
        """Complete `future`, from the engine's thread. Only the first call counts."""
        if self.finished:
            return
        self.finished = True
        loop = self.future.get_loop()
        if error is None:
            loop.call_soon_threadsafe(self.future.set_result, None)
        else:
            loop.call_soon_threadsafe(self.future.set_exception, error)


class Batch:
    """Steps the engine, in its thread, for as long as there are songs."""

    def __init__(self, engine: TokenEngine) -> None:
        self.rate = Throughput()
        self.limit = engine.slots  # songs at once; halved by errors, and one more again for each song that ends well
        self._engine = engine
        self._songs: list[BatchedSong] = []  # changed by the engine's thread alone
        self._arrived: list[BatchedSong] = []
        self._lock = threading.Lock()  # guards `_arrived` and `_running`
        self._running = False

    async def generate(
        self,
        context: JobContext,
        song: Song,
        frames: np.ndarray,
        executor: Executor,
        on_frame: Callable[[BatchedSong], None],
        returns: Callable[[], bool] = lambda: True,
    ) -> BatchedSong:
        """Continue a song from int16 `frames` ``[8, T]``, T ≥ 0, until it ends or leaves the batch.

        Its ``future`` is done then: without an error when the song has ended; with what `JobContext.check` raised, with
        `Paused`, with `DeviceFull` when the song alone does not fit, or with what the engine raised. The frames made
        so far are valid in each case.

        A paused song's caches are parked if it may come back here, which `returns` says.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        batched = BatchedSong(context, song, future, on_frame, list(frames.T), frames.shape[1], returns)
        with self._lock:
            self._arrived.append(batched)
            if not self._running:
                self._running = True
                executor.submit(self._run)
        await asyncio.wait({future})
        if isinstance(future.exception(), Paused):
            loop.call_later(PARKED_SECONDS, executor.submit, self._engine.expire)
        return batched

    # --- in the engine's thread

    def _run(self) -> None:
        while True:
            with self._lock:
                arrived, self._arrived = self._arrived, []
                if not arrived and not self._songs:
                    self._running = False
                    return
            try:
                for batched in arrived:
                    self._admit(batched)
                self._drop_stopped()
                if self._songs:
                    self._step()
            except Exception as error:  # a fault in this file: no song may wait for ever because of it
                log.exception("the batch failed")
                for batched in list(self._songs):
                    self._drop(batched, error)
                for batched in arrived:
                    batched.finish(error)

    def _admit(self, batched: BatchedSong) -> None:
        turn = batched.context.turn
        before = batched.codes if batched.frames else None
        try:
            batched.context.check()
            turn.place_work(batched.cache_label, self._engine.song_bytes(batched.song))
            self._engine.admit(batched.job_id, batched.song, before)
            self._songs.append(batched)
        except DeviceFull as error:
            self._engine.drop(batched.job_id)  # what had been allocated for it goes back
            turn.remove(batched.cache_label)
            if self._songs:  # not now; when the batch is smaller
                self.limit = len(self._songs)
                log.warning("%s: does not fit beside %d other songs: %s", batched.job_id, len(self._songs), error)
                batched.finish(Paused("there is no memory for it beside the others"))
            else:
                batched.finish(error)
        except Exception as error:
            turn.remove(batched.cache_label)
            batched.finish(error)

    def _drop_stopped(self) -> None:
        """Drop songs that were cancelled or paused, and all of them when the lease is lost."""
        for batched in list(self._songs):
            try:
                batched.context.check()
                if len(batched.frames) > batched.resumed:  # however short turns are, each gets every song further
                    batched.context.check_pause()
            except Paused as pause:
                self._pause(batched, pause)
            except Exception as error:
                self._drop(batched, error)

    def _step(self) -> None:
        began = time.monotonic()
        try:
            made = self._engine.step()
        except DeviceFull as error:
            self._shrink(error, keep=len(self._songs) // 2)
            return
        except DeviceBroken as error:
            for batched in list(self._songs):
                self._drop(batched, error)
            return
        except Exception as error:  # neither whose fault it is nor the state of the engine's songs is known
            self._shrink(error, keep=0)
            return
        count = 0
        for batched in list(self._songs):
            if batched.job_id not in made:  # its frame is still being computed
                continue
            frame = made[batched.job_id]
            if frame is None:
                self._drop(batched, None)
                self.rate.song(batched.made)
                self.limit = min(self.limit + 1, self._engine.slots)
            else:
                count += 1
                batched.frames.append(frame)
                batched.on_frame(batched)
        self.rate.add(count, began)

    def _shrink(self, error: Exception, keep: int) -> None:
        """Halve the batch after an error: `keep` songs continue, the others wait for another turn.

        With half as many at once each time, a song that causes the error is soon alone, and only then blamed for it.
        """
        count = len(self._songs)
        if count == 1:
            self._drop(self._songs[0], error)
            return
        self.limit = count // 2
        log.warning("%d songs at once are too many, continuing with %d: %r", count, self.limit, error)
        pause = self._pause if isinstance(error, DeviceFull) else self._drop
        for batched in self._songs[keep:]:
            pause(batched, Paused("it waits until fewer songs are made at once"))

    def _pause(self, batched: BatchedSong, pause: Paused) -> None:
        """Drop a song that will go on, and park its caches: the device is still ours and they are sound."""
        try:
            if batched.returns():
                self._engine.park(batched.job_id, batched.codes)
        except Exception as error:  # as when the copies do not fit the device; they are only a short cut
            log.warning("%s: its caches are not kept: %r", batched.job_id, error)
        self._drop(batched, pause)

    def _drop(self, batched: BatchedSong, error: Exception | None) -> None:
        self._songs.remove(batched)
        try:
            self._engine.drop(batched.job_id)
            batched.context.turn.remove(batched.cache_label)
        except Exception as failure:  # as from a broken device; the song must leave all the same
            log.warning("%s: its caches were not freed: %r", batched.job_id, failure)
            error = error or failure
        finally:
            batched.finish(error)
