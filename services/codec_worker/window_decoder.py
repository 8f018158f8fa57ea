"""The windows of one song, as the engine makes them while the song has it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.codec_worker.engines.base import CodecEngine, DecodeState, DecodeStep, KeptWindows
from shared.frames import frames_nearest
from shared.worker.draining import Draining
from shared.worker.job_context import JobContext
from shared.worker.signals import Paused
from shared.worker.throughput import Throughput

_FINISH_SECONDS = 5.0  # a worker that shuts down finishes a window that needs no longer than this


@dataclass(frozen=True)
class Window:
    """The audio that a window made final."""

    audio: np.ndarray  # float32 [samples, 2]
    state: DecodeState | None  # after it; None where the song ends with it
    more: bool  # another one is final too


class WindowDecoder:
    """Decodes what is final of a song after a state. Its methods belong to the engine's thread."""

    def __init__(
        self,
        engine: CodecEngine,
        state: DecodeState,
        codes: np.ndarray,
        *,
        ended: bool,
        kept: KeptWindows,
        context: JobContext,
        draining: Draining,
        rate: Throughput,
        on_step: Callable[[DecodeStep], None],
    ) -> None:
        """`codes` are those of the song so far, int16 ``[8, T]``. Raises as `CodecEngine.advance`."""
        self._steps = engine.advance(state, codes, ended=ended, kept=kept)
        self._sample_rate = engine.sample_rate
        self._context, self._draining, self._rate, self._on_step = context, draining, rate, on_step

    def next(self) -> Window | None:
        """Decode the next window; None when no more is final.

        Raises `LeaseLost`, `PhaseError` or `JobStopped` before a step that must not run, and `Paused` when the worker
        shuts down and much is left of the window.
        """
        began, done = time.monotonic(), 0
        pieces: list[np.ndarray] = []
        while True:
            self._context.check()
            step = next(self._steps, None)
            if step is None:
                return self._window(pieces, None, began, more=False) if pieces else None
            done += 1
            if step.audio is not None:
                pieces.append(step.audio)
            if step.state is not None:
                self._on_step(step)
                return self._window(pieces, step.state, began, more=step.done < step.total)
            left = (time.monotonic() - began) / done * step.window_left  # seconds
            if self._draining.active and left > _FINISH_SECONDS:
                raise Paused("the worker is shutting down")
            self._on_step(step)

    def _window(self, pieces: list[np.ndarray], state: DecodeState | None, began: float, *, more: bool) -> Window:
        audio = np.concatenate(pieces)
        self._rate.add(frames_nearest(len(audio) / self._sample_rate), began)
        return Window(audio, state, more)

    def close(self) -> None:
        """Give the device's work memory back."""
        self._steps.close()
