"""A song at another sample rate, or with one channel, before it is encoded."""

import numpy as np
import soxr

from shared.audio.encoder import Encoder
from shared.audio.pcm import FULL_SCALE, pcm16


class Resampler:
    """Makes samples of another rate or number of channels, and the same ones, however they come in.

    soxr makes up for its delay: the first sample is that of the song's beginning, and of n samples come
    n * target / source, to the nearest whole number. What becomes louder than full scale is clipped.
    """

    def __init__(self, source_rate: int, target_rate: int, channels: int) -> None:
        """Rates in Hz; `channels` are those of the result, 1 or 2."""
        self._channels = channels
        self._stream = None
        if source_rate != target_rate:
            self._stream = soxr.ResampleStream(source_rate, target_rate, channels, "float32", quality="HQ")

    def add(self, pcm: np.ndarray) -> np.ndarray:
        """Take the next int16 ``[samples, 2]``; returns int16 ``[other samples, channels]``, as far as they are known.

        Some hundredths of a second wait for what comes next.
        """
        return self._resampled(pcm, last=False)

    def finish(self) -> np.ndarray:
        """Return the last samples."""
        return self._resampled(np.empty((0, 2), np.int16), last=True)

    def _resampled(self, pcm: np.ndarray, *, last: bool) -> np.ndarray:
        audio = pcm.astype(np.float32) / FULL_SCALE
        if self._channels == 1:
            audio = audio.mean(axis=1, keepdims=True)
        if self._stream is not None:
            audio = self._stream.resample_chunk(audio, last)
        return pcm16(audio)


class ConvertingEncoder:
    """An `Encoder` of 16-bit stereo that hands on to another one what a `Resampler` makes of it."""

    def __init__(self, encoder: Encoder, source_rate: int, target_rate: int, channels: int) -> None:
        self._encoder, self._resampler = encoder, Resampler(source_rate, target_rate, channels)
        self.header = encoder.header

    def encode(self, pcm: np.ndarray) -> bytes:
        """As `Encoder.encode`."""
        return self._encoder.encode(self._resampler.add(pcm))

    def finish(self) -> tuple[bytes, bytes]:
        """As `Encoder.finish`."""
        last = self._encoder.encode(self._resampler.finish())
        end, header = self._encoder.finish()
        return last + end, header

    def close(self) -> None:
        """As `Encoder.close`."""
        self._encoder.close()
