"""Songs that are made together: they join and leave between two steps of the engine."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from services.tokenizer_worker.engines.base import Song, TokenEngine
from shared.errors import DeviceBroken, DeviceFull
from shared.worker.job_context import JobContext, Paused
from shared.worker.throughput import Throughput

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Making:
    """A song in the batch."""

    delivery: JobContext
    song: Song
    future: "asyncio.Future[None]"
    on_frame: Callable[["Making"], None]  # called in the engine's thread
    frames: list[np.ndarray]  # int16 [8] each, those made before included
    resumed: int  # frames made before
    finished: bool = False  # it has left the batch
    began: float = field(default_factory=time.monotonic)

    @property
    def codes(self) -> np.ndarray:
        """int16 ``[8, T]``."""
        return np.stack(self.frames, axis=1) if self.frames else np.zeros((8, 0), np.int16)

    @property
    def label(self) -> str:
        """Of its caches in the device's ledger."""
        return f"kv-cache {self.delivery.job.job_id}"

    def finish(self, error: Exception | None) -> None:
        """Out of the batch; from the engine's thread. Only the first call counts."""
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
        self.limit = engine.slots  # songs at once; halved by trouble, and one more again for each song that ends well
        self._engine = engine
        self._songs: list[Making] = []  # the engine's thread alone changes it
        self._arrived: list[Making] = []
        self._lock = threading.Lock()  # guards `_arrived` and `_running`
        self._running = False

    async def make(
        self,
        delivery: JobContext,
        song: Song,
        frames: np.ndarray,
        executor: Executor,
        on_frame: Callable[[Making], None],
    ) -> Making:
        """Make a song from int16 `frames` ``[8, T]`` on, T ≥ 0, until it ends or leaves the batch.

        Its ``future`` is done then: without a result when the song has ended; with what `JobContext.check` raised, with
        `Paused`, with `DeviceFull` when the song alone does not fit, or with what the engine raised. The frames made
        so far are good in each case.
        """
        making = Making(
            delivery,
            song,
            asyncio.get_running_loop().create_future(),
            on_frame,
            list(frames.T),
            frames.shape[1],
        )
        with self._lock:
            self._arrived.append(making)
            if not self._running:
                self._running = True
                executor.submit(self._run)
        await asyncio.wait({making.future})
        return making

    # --- in the engine's thread

    def _run(self) -> None:
        while True:
            with self._lock:
                arrived, self._arrived = self._arrived, []
                if not arrived and not self._songs:
                    self._running = False
                    return
            try:
                for making in arrived:
                    self._admit(making)
                self._sort_out()
                if self._songs:
                    self._step()
            except Exception as error:  # a fault of ours: nobody may wait for ever because of it
                log.exception("the batch is given up")
                for making in list(self._songs):
                    self._drop(making, error)
                for making in arrived:
                    making.finish(error)

    def _admit(self, making: Making) -> None:
        job_id = making.delivery.job.job_id
        before = making.codes if making.frames else None
        try:
            making.delivery.check()
            making.delivery.turn.place_work(making.label, self._engine.song_bytes(making.song))
            self._engine.admit(job_id, making.song, before)
            self._songs.append(making)
        except DeviceFull as error:
            making.delivery.turn.remove(making.label)
            if self._songs:  # not now; when the batch is smaller
                self.limit = len(self._songs)
                log.warning("%s: not beside %d others: %s", job_id, len(self._songs), error)
                making.finish(Paused("there is no memory for it beside the others"))
            else:
                making.finish(error)
        except Exception as error:
            making.delivery.turn.remove(making.label)
            making.finish(error)

    def _sort_out(self) -> None:
        """Let go of songs that were cancelled or paused, and of all of them when the lease is lost."""
        for making in list(self._songs):
            try:
                making.delivery.check()
                if len(making.frames) > making.resumed:  # however short turns are, each gets every song further
                    making.delivery.check_pause()
            except Exception as error:
                self._drop(making, error)

    def _step(self) -> None:
        began = time.monotonic()
        try:
            made = self._engine.step()
        except DeviceFull as error:
            self._shrink(error, keep=len(self._songs) // 2)
            return
        except DeviceBroken as error:
            for making in list(self._songs):
                self._drop(making, error)
            return
        except Exception as error:  # whose fault it is cannot be told, nor what state the engine's songs are in
            self._shrink(error, keep=0)
            return
        count = 0
        for making in list(self._songs):
            job_id = making.delivery.job.job_id
            if job_id not in made:  # the engine has it in the air
                continue
            frame = made[job_id]
            if frame is None:
                self._drop(making, None)
                self.rate.song(len(making.frames))
                self.limit = min(self.limit + 1, self._engine.slots)
            else:
                count += 1
                making.frames.append(frame)
                making.on_frame(making)
        self.rate.add(count, began)

    def _shrink(self, error: Exception, keep: int) -> None:
        """After an error that a song alone has to answer for, `keep` songs go on and the others wait for their turn.

        With half as many at once each time, one that is to blame is soon alone.
        """
        count = len(self._songs)
        if count == 1:
            self._drop(self._songs[0], error)
            return
        self.limit = count // 2
        log.warning("%d songs at once are too many, going on with %d: %r", count, self.limit, error)
        for making in self._songs[keep:]:
            self._drop(making, Paused("it waits until fewer songs are made at once"))

    def _drop(self, making: Making, error: Exception | None) -> None:
        self._songs.remove(making)
        try:
            self._engine.drop(making.delivery.job.job_id)
            making.delivery.turn.remove(making.label)
        except Exception as trouble:  # as from a broken device; the song must leave all the same
            log.warning("%s: not freed, %r", making.delivery.job.job_id, trouble)
            error = error or trouble
        finally:
            making.finish(error)
