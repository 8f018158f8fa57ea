"""What a song's listeners may expect: its place in the queue, and when it will be ready."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean

from services.gateway.monitoring.worker_registry import Workers
from services.gateway.songs.queue_position import QueuePositions
from shared.errors import Unavailable
from shared.frames import frames_within
from shared.schema.base import timestamp
from shared.schema.event import Progress
from shared.schema.job import Job
from shared.schema.request import GenerateRequest
from shared.schema.worker import WorkerStatus

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Expectation:
    """What is expected of a song; None where nobody can say."""

    position: int | None = None  # songs before it, while it waits
    at: float | None = None  # when it will be completed, seconds since the epoch

    @classmethod
    def told(cls, position: int | None, eta: str | None) -> "Expectation":
        """What somebody was told."""
        return cls(position, None if eta is None else datetime.fromisoformat(eta).timestamp())

    @property
    def eta(self) -> str | None:
        """`at` as users are told."""
        return None if self.at is None else timestamp(self.at)


class EtaEstimator:
    """Expectations of one gateway."""

    def __init__(self, line: QueuePositions, workers: Workers) -> None:
        self._line, self._workers = line, workers

    async def of(self, job: Job, progress: Progress | None = None) -> Expectation:
        """What is expected of a song, given its latest progress. Raises `Unavailable`."""
        now_at_pace = pace(await self._workers.live())
        position, seconds = None, None
        match job.status:
            case "queued":
                position = await self._line.position(job)
                if position is not None:
                    seconds = now_at_pace.waiting(position, longest_frames(job.request))
            case "generating" if progress and progress.status == "generating":
                seconds = now_at_pace.generating(progress)
            case "decoding":
                decoded = progress if progress and progress.status == "decoding" else None
                seconds = now_at_pace.decoding(decoded, job.frames or longest_frames(job.request))
        return Expectation(position, None if seconds is None else time.time() + seconds)

    async def of_accepted(self, job: Job, sequence: int) -> Expectation:
        """The same for a song that was taken just now, its message too: whatever fails, it was taken."""
        try:
            await self._line.position(job, sequence)
            return await self.of(job)
        except Unavailable as error:
            log.info("%s: taken, its place is not known: %s", job.job_id, error)
            return Expectation()


def _sum(rates: Iterable[float | None]) -> float | None:
    return sum(rate for rate in rates if rate and rate > 0) or None


def _mean(lengths: Iterable[float | None]) -> float | None:
    known = [length for length in lengths if length and length > 0]
    return fmean(known) if known else None
