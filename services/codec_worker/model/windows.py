"""Windows: how a song is cut into pieces for the codec, and how their audio is joined."""

from dataclasses import dataclass

import numpy as np

from shared.frames import samples_of

WINDOW = 372  # codes, 29.76 s


@dataclass(frozen=True)
class WindowPlan:
    """The windows of a song. Lengths in codes (80 ms) unless they say otherwise.

    A window is decoded from all of its codes at once: its audio is final when they are there, and its last `overlap`
    only with the window after it. The last window, and the only one of a short song, is filled from the song's
    beginning, so it waits for the song's end.
    """

    frames: int  # of the song, or of what there is of a song that goes on
    sample_rate: int  # Hz
    window: int = WINDOW  # codes a window
    ended: bool = True  # false: the song goes on

    @property
    def hop(self) -> int:
        """Codes from the start of one window to the start of the next."""
        return self.window // 93 * 80

    @property
    def overlap(self) -> int:
        """Number of codes that two neighbours share."""
        return self.window - self.hop

    @property
    def context(self) -> int:
        """Number of latents that a window takes over from the one before."""
        return 2 * self.overlap

    @property
    def count(self) -> int:
        """Number of windows that the song needs; of one that goes on, how many have all their codes.

        The reference needs one less for songs of `2 · overlap + n · hop` codes, and loses their end.
        """
        if not self.ended:
            return max(0, (self.frames - self.overlap) // self.hop)
        return max(1, -(-(self.frames - self.overlap) // self.hop))

    def end(self, index: int) -> int:
        """The code after a window's last."""
        return index * self.hop + self.window

    def is_last(self, index: int) -> bool:
        """Whether the song ends with this window."""
        return self.ended and index == self.count - 1

    @property
    def samples(self) -> int:
        """Number of samples of the whole song, a channel."""
        return samples_of(self.frames, self.sample_rate)

    @property
    def window_samples(self) -> int:
        """Number of samples of a window, a channel."""
        return samples_of(self.window, self.sample_rate)

    @property
    def overlap_samples(self) -> int:
        """Number of samples over which two neighbours are cross-faded."""
        return samples_of(self.overlap, self.sample_rate)

    def needed(self, index: int) -> int:
        """Number of latents of a window whose waveform the song needs: all, except in the last window."""
        samples = self.samples - index * (self.window_samples - self.overlap_samples)
        return min(2 * self.window, -(-samples * 2 * self.window // self.window_samples))

    def cut(self, codes: np.ndarray, index: int) -> np.ndarray:
        """Codes ``[8, window]`` of a window; beyond its end the song begins again."""
        positions = np.arange(index * self.hop, index * self.hop + self.window)
        return np.asarray(codes[:, positions % self.frames])


class Splicer:
    """Joins decoded windows with linear cross-fades, and hands out the samples that are final.

    Windows come in pieces of any length, in order. What is kept is the overlap that waits for the next window: between
    two windows it is all that another splicer needs to go on, beside the numbers.
    """

    def __init__(
        self, plan: WindowPlan, *, window: int = 0, emitted: int = 0, overlap: np.ndarray | None = None
    ) -> None:
        """Begin with the window of this index, after `emitted` samples, with the `overlap` of the window before."""
        self._plan = plan
        self.overlap = np.zeros((2, plan.overlap_samples), np.float32)  # [2, samples]
        if overlap is not None:
            self.overlap[:] = overlap
        self.emitted = emitted  # samples a channel that were handed out
        self._ramp = np.linspace(0, 1, plan.overlap_samples)  # float64, its endpoints included
        self._window, self._at = window, 0  # at: samples of this window that have come

    def add(self, piece: np.ndarray) -> np.ndarray:
        """Add a window's next samples, float32 ``[2, samples]``; returns those that are final now, float32 ``[n, 2]``.

        A window ends with its last sample; samples beyond that are dropped.
        """
        plan, start = self._plan, self._at
        piece = piece[:, : plan.window_samples - start]
        self._at += piece.shape[1]
        if self._window and start < plan.overlap_samples:
            ramp = self._ramp[start : self._at]
            over = self.overlap[:, start : self._at] * (1 - ramp) + piece[:, : len(ramp)] * ramp
            piece = np.concatenate((over.astype(np.float32), piece[:, len(ramp) :]), axis=1)
        if not plan.is_last(self._window):
            fading = plan.window_samples - plan.overlap_samples  # from here on the next window has its say
            piece, kept = np.split(piece, [max(0, fading - start)], axis=1)
            place = max(0, start - fading)
            self.overlap[:, place : place + kept.shape[1]] = kept
        if self._at == plan.window_samples:
            self._window, self._at = self._window + 1, 0
        final = piece[:, : plan.samples - self.emitted]
        self.emitted += final.shape[1]
        return np.ascontiguousarray(final.T)
