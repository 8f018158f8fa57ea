"""When a song will be ready, from what workers measured and nothing else. Pure arithmetic on frames and seconds.

Every duration is None where a rate that it needs is unknown: no number is better than a made-up one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from shared.frames import frames_within
from shared.schema.event import Progress
from shared.schema.request import GenerateRequest
from shared.schema.worker import WorkerStatus

_MOVED_SECONDS = 5.0
_MOVED_SHARE = 0.1


@dataclass(frozen=True)
class Pace:
    """How fast all live workers together are, of late."""

    tokens: float | None  # frames a second
    audio: float | None  # frames decoded a second
    song_frames: float | None  # mean length of the latest songs

    def waiting(self, songs_before: int, frames: int) -> float | None:
        """Seconds for a song of `frames` that has not begun."""
        if self.tokens is None or self.audio is None:
            return None
        if songs_before == 0:  # the others' length does not matter
            return frames * (1 / self.tokens + 1 / self.audio)
        if self.song_frames is None:
            return None
        return (songs_before * self.song_frames + frames) * (1 / self.tokens + 1 / self.audio)

    def generating(self, progress: Progress) -> float | None:
        """Seconds for a song whose tokens are being made, at its own rate."""
        if self.audio is None or not progress.rate or progress.rate < 0:
            return None
        return max(0, progress.total - progress.done) / progress.rate + progress.total / self.audio

    def decoding(self, progress: Progress | None, frames: int) -> float | None:
        """Seconds for a song of `frames` whose audio is made; without progress nothing of it is."""
        if self.audio is None:
            return None
        done = min(1.0, progress.done / max(progress.total, 1)) if progress else 0.0
        return (1 - done) * frames / self.audio


def pace(workers: Sequence[WorkerStatus]) -> Pace:
    """Put heartbeats together."""
    tokenizers = [worker for worker in workers if worker.role == "tokenizer"]
    return Pace(
        tokens=_sum(worker.rate for worker in tokenizers),
        audio=_sum(worker.rate for worker in workers if worker.role == "codec"),
        song_frames=_mean(worker.song_frames for worker in tokenizers),
    )


def longest_frames(request: GenerateRequest) -> int:
    """The length of a song that has not been made, in frames: nobody knows better than what was asked for."""
    return frames_within(request.max_duration_ms or 0)


def moved(before: float | None, after: float | None, now: float) -> bool:
    """Whether a time of completion differs enough from what was told to be told again. Seconds since the epoch."""
    if before is None or after is None:
        return before is not after
    return abs(after - before) > max(_MOVED_SECONDS, _MOVED_SHARE * (before - now))


def _sum(rates: Iterable[float | None]) -> float | None:
    return sum(rate for rate in rates if rate and rate > 0) or None


def _mean(lengths: Iterable[float | None]) -> float | None:
    known = [length for length in lengths if length and length > 0]
    return fmean(known) if known else None
