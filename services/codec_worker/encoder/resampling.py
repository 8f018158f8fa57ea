"""Resampling by a windowed sinc, with torchaudio's defaults, which the encoder was trained with.

Output n lies at t = n · old / new of the input. It is the sum of the inputs at distance d (in periods of the lower
rate, times 0.99) below 6, weighted by sin(πd)/(πd) · cos²(πd/12): bandlimited interpolation under a Hann window
(Smith & Gossett 1984). With both rates divided by their greatest divisor, outputs repeat in phases: `new` outputs a
block of `old` inputs.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ZEROS = 6  # zero crossings of the sinc on each side
ROLLOFF = 0.99  # of the lower rate's Nyquist frequency
_PHASES = 128  # whose taps are computed and applied at once: rates without a common divisor have tens of thousands


class Resampler:
    """Resamples from one rate to another, in Hz; taps are computed in `dtype` and applied in fp32, on the CPU."""

    def __init__(self, old: int, new: int, dtype: torch.dtype = torch.float32) -> None:
        if old <= 0 or new <= 0:
            raise ValueError(f"audio of {old} Hz cannot be resampled to {new} Hz")
        common = math.gcd(old, new)
        self._old, self._new, self._dtype = old // common, new // common, dtype
        self._base = ROLLOFF * min(self._old, self._new)
        self.width = math.ceil(ZEROS * self._old / self._base)
        """Inputs on each side of a block that its outputs depend on."""

    def length(self, samples: int) -> int:
        """Number of outputs of so many inputs, rounded up."""
        return -(-self._new * samples // self._old)

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """Range of the inputs that the outputs from `start` to `stop` depend on; it may go beyond the recording."""
        if self._old == self._new:
            return start, stop
        blocks = start // self._new, -(-stop // self._new)
        return blocks[0] * self._old - self.width, blocks[1] * self._old + self.width

    def taps(self, first: int, last: int) -> tuple[int, Tensor]:
        """Taps of the phases from `first` up to `last`: the first tap's place in the block, fp32 ``[phases, taps]``.

        Taps at which the sinc of every one of these phases has ended are left out.
        """
        old, new, base = self._old, self._new, self._base
        start = max(-self.width, math.floor(old * (first / new - ZEROS / base)))
        stop = min(self.width + old, math.ceil(old * ((last - 1) / new + ZEROS / base)) + 1)
        places = torch.arange(start, stop, dtype=self._dtype) / old
        phases = torch.arange(first, last, dtype=self._dtype)[:, None] / new
        distance = ((places - phases) * base).clamp(-ZEROS, ZEROS)
        window = (distance * (math.pi / (2 * ZEROS))).cos().square()
        angle = distance * math.pi
        sinc = torch.where(angle == 0, torch.ones_like(angle), angle.sin() / angle)
        return start, (sinc * (window * (base / old))).float()

    def __call__(self, audio: Tensor | np.ndarray, start: int = 0, stop: int | None = None) -> Tensor:
        """Compute the outputs from `start` to `stop` of all of ``audio [channels, samples]`` fp32.

        Returns fp32 ``[channels, stop - start]``. Only the inputs that these depend on are read; before the first and
        after the last there are zeros.
        """
        stop = self.length(audio.shape[1]) if stop is None else stop
        inputs = _read(audio, *self.reach(start, stop))
        if self._old == self._new:
            return inputs
        first, blocks = start % self._new, -(-stop // self._new) - start // self._new
        phases = torch.cat([*self._filtered(inputs, blocks)], dim=1)  # [channels, new, blocks]
        return phases.transpose(1, 2).flatten(1)[:, first : first + stop - start]

    def _filtered(self, inputs: Tensor, blocks: int) -> Iterator[Tensor]:
        """Outputs ``[channels, phases, blocks]`` of some phases after the other."""
        for first in range(0, self._new, _PHASES):
            place, taps = self.taps(first, min(first + _PHASES, self._new))
            place += self.width
            reached = inputs[:, None, place : place + (blocks - 1) * self._old + taps.shape[1]]
            yield F.conv1d(reached, taps[:, None], stride=self._old)


def _read(audio: Tensor | np.ndarray, start: int, stop: int) -> Tensor:
    """Samples from `start` to `stop`, fp32 ``[channels, stop - start]``; zeros where there are none."""
    found = torch.zeros(audio.shape[0], stop - start)
    low, high = max(start, 0), min(stop, audio.shape[1])
    if low < high:
        part = audio[:, low:high]
        copied = torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part
        found[:, low - start : high - start] = copied
    return found
