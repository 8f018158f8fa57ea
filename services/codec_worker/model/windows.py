"""How a song is cut into windows and put together again."""

import math
from dataclasses import dataclass

import numpy as np

from shared.checkpoint import FRAMES_PER_SECOND

WINDOW_SECONDS = 29.76


@dataclass(frozen=True)
class WindowPlan:
    """The windows of a song of `frames` codes. Lengths in codes (80 ms) unless they say otherwise."""

    frames: int
    sample_rate: int  # Hz
    seconds: float = WINDOW_SECONDS

    @property
    def window(self) -> int:
        """Codes a window."""
        return int(self.seconds * FRAMES_PER_SECOND)

    @property
    def hop(self) -> int:
        """Codes from the start of one window to the start of the next."""
        return self.window // 93 * 80

    @property
    def overlap(self) -> int:
        """Codes that two neighbours share."""
        return self.window - self.hop

    @property
    def context(self) -> int:
        """Latents that a window takes over from the one before."""
        return 2 * self.overlap

    @property
    def count(self) -> int:
        """Windows that the song needs.

        The reference needs one less for songs of `2 · overlap + n · hop` codes, and loses their end.
        """
        return max(1, math.ceil((self.frames - self.overlap) / self.hop))

    @property
    def samples(self) -> int:
        """Samples a channel of the whole song."""
        return int(self.frames / FRAMES_PER_SECOND * self.sample_rate)

    @property
    def window_samples(self) -> int:
        """Samples a channel of a window."""
        return int(self.seconds * self.sample_rate)

    @property
    def overlap_samples(self) -> int:
        """Samples over which two neighbours are cross-faded."""
        return self.window_samples - self.window_samples // 93 * 80

    def cut(self, codes: np.ndarray, index: int) -> np.ndarray:
        """The codes ``[8, window]`` of a window; beyond its end the song begins again."""
        positions = np.arange(index * self.hop, index * self.hop + self.window)
        return np.asarray(codes[:, positions % self.frames])


class Splicer:
    """Joins decoded windows, cross-fading linearly, and hands out what is final."""

    def __init__(self, plan: WindowPlan) -> None:
        self._plan = plan
        self._tail: np.ndarray | None = None  # float32 [2, overlap], waits for the next window
        self._windows = self._emitted = 0

    def add(self, window: np.ndarray) -> np.ndarray:
        """float32 ``[2, samples]`` of the next window → the stretch that is final now, float32 ``[n, 2]``."""
        plan, overlap = self._plan, self._plan.overlap_samples
        window = window[:, : plan.window_samples]
        if self._tail is not None:
            ramp = np.linspace(0, 1, overlap)  # float64, its endpoints included
            head = self._tail * (1 - ramp) + window[:, :overlap] * ramp
            window = np.concatenate((head.astype(np.float32), window[:, overlap:]), axis=1)
        self._windows += 1
        if self._windows < plan.count:
            window, self._tail = window[:, :-overlap], window[:, -overlap:].copy()
        final = window[:, : plan.samples - self._emitted]
        self._emitted += final.shape[1]
        return np.ascontiguousarray(final.T)
