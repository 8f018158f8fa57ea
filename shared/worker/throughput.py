"""The speed of a worker's latest work: for forecasts, not for decisions."""

import time

_MEMORY = 60.0  # seconds of work after which older work counts for little
_SONGS = 0.2  # weight of the latest song in the mean length


class Throughput:
    """Frames a second of working time, and the mean length of a song. Written by one thread, read by any."""

    def __init__(self) -> None:
        self._frames = 0.0
        self._seconds = 0.0
        self.song_frames: float | None = None  # mean length of the latest songs
        self.all_frames = 0  # since the start
        self.all_seconds = 0.0  # of work on them

    @property
    def per_second(self) -> float | None:
        """Frames a second in the latest work; None before the first."""
        return round(self._frames / self._seconds, 3) if self._seconds else None

    def add(self, frames: int, began: float) -> None:
        """Count frames on which the time since `began` (monotonic, in seconds) was spent."""
        seconds = max(time.monotonic() - began, 1e-9)
        keep = max(0.0, 1 - seconds / _MEMORY)
        self._frames = self._frames * keep + frames
        self._seconds = self._seconds * keep + seconds
        self.all_frames += frames
        self.all_seconds += seconds

    def song(self, frames: int) -> None:
        """Count a finished song."""
        last = self.song_frames
        self.song_frames = float(frames) if last is None else last + _SONGS * (frames - last)
