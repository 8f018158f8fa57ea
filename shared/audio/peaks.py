"""A song's waveform: the lowest and highest sample of every short stretch, computed while its audio is written.

In the JSON form of BBC's audiowaveform, which players know.
"""

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np

from shared.errors import ObjectError

CONTENT_TYPE = "application/json"
MOST = 4000  # points; even, and above it two become one
FINEST = 256  # samples a point, at first


class PeaksBody(msgspec.Struct, frozen=True, kw_only=True):
    """Version 2 of audiowaveform's format, one channel: the mean of all."""

    version: int = 2
    channels: int = 1
    sample_rate: int  # Hz
    samples_per_pixel: int
    bits: int = 8
    length: int  # points
    data: list[int]  # lowest and highest sample of each point in turn, -127 to 127


class Peaks:
    """Gathers points, `MOST` at most, in memory that does not grow with the song."""

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate, self._per_point = sample_rate, FINEST
        self._points = np.empty((MOST, 2), np.float32)
        self._count = 0
        self._rest = np.empty(0, np.float32)  # samples of a point that is not full yet

    def add(self, audio: np.ndarray) -> None:
        """Add the next block of audio, float32 (full scale is 1) or int16 ``[samples, channels]``."""
        scale = 1 / 32768 if audio.dtype == np.int16 else 1.0
        rest = np.concatenate([self._rest, audio.mean(axis=1, dtype=np.float32) * np.float32(scale)])
        while len(rest) >= self._per_point:
            fit = min(len(rest) // self._per_point, MOST - self._count)
            points = rest[: fit * self._per_point].reshape(fit, self._per_point)
            rest = rest[fit * self._per_point :]
            self._points[self._count : self._count + fit] = np.stack([points.min(axis=1), points.max(axis=1)], axis=1)
            self._count += fit
            if self._count == MOST:
                self._fold()
        self._rest = rest.copy()

    def _fold(self) -> None:
        pairs = self._points.reshape(-1, 2, 2)
        self._count = MOST // 2
        self._points[: self._count] = np.stack([pairs[:, :, 0].min(axis=1), pairs[:, :, 1].max(axis=1)], axis=1)
        self._per_point *= 2

    def pack(self) -> dict[str, np.ndarray]:
        """Return what `unpack` needs to go on from here, in another process too: arrays of a few kilobytes."""
        return {
            "rate_and_samples_per_point": np.array([self._sample_rate, self._per_point], np.int64),
            "points": self._points[: self._count].copy(),  # float32 [points, 2]
            "rest": self._rest.copy(),  # float32 [samples]
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, np.ndarray]) -> "Peaks":
        """Return the peaks that `pack` was called for. Raises `ObjectError` when they are damaged."""
        try:
            sample_rate, per_point = packed["rate_and_samples_per_point"].tolist()
            points, rest = packed["points"], packed["rest"]
            if points.shape[1:] != (2,) or len(points) >= MOST or rest.ndim != 1:
                raise ValueError(f"points {points.shape}, rest {rest.shape}")
        except (KeyError, ValueError) as error:
            raise ObjectError(f"the peaks cannot be read: {error}") from None
        peaks = cls(sample_rate)
        peaks._per_point, peaks._count, peaks._rest = per_point, len(points), rest
        peaks._points[: len(points)] = points
        return peaks

    def json(self) -> bytes:
        """The peaks of everything that was added, as a `PeaksBody`."""
        points = self._points[: self._count]
        if len(self._rest):
            points = np.concatenate([points, [[self._rest.min(), self._rest.max()]]])
        data = np.rint(np.clip(points, -1, 1) * 127).astype(int).ravel().tolist()
        body = PeaksBody(
            sample_rate=self._sample_rate, samples_per_pixel=self._per_point, length=len(points), data=data
        )
        return msgspec.json.encode(body)


def peaks_of(blocks: Iterable[np.ndarray], sample_rate: int) -> bytes:
    """The peaks of blocks of audio, in the form that `Peaks.add` takes."""
    peaks = Peaks(sample_rate)
    for block in blocks:
        peaks.add(block)
    return peaks.json()
