"""The ETA of a song: its place in the queue and when it will be ready, from the measurements of workers alone.

A duration is None where a rate that it needs is unknown: no number is better than a made-up one.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean

from services.gateway.monitoring.worker_registry import WorkerRegistry
from services.gateway.songs.queue_position import QueuePositions
from shared.errors import Unavailable
from shared.frames import frames_nearest, frames_within
from shared.schema.base import timestamp
from shared.schema.event import Progress
from shared.schema.job import Job
from shared.schema.request import GenerateRequest
from shared.schema.worker import WorkerStatus

log = logging.getLogger(__name__)

_MOVED_SECONDS = 5.0
_MOVED_SHARE = 0.1  # of the time that was left


@dataclass(frozen=True)
class Pace:
    """The speed of all live workers together in the last minutes."""

    tokens: float | None  # frames a second
    audio: float | None  # frames decoded a second
    song_frames: float | None  # mean number of frames that were made for the latest songs
    decoded_frames: float | None = None  # mean length of the latest songs, frames that they took over included

    def waiting(self, songs_before: int, frames: int, kept: int = 0) -> float | None:
        """Seconds until a song of `frames` is ready that has not begun; tokens of `kept` ones are there already."""
        if self.tokens is None or self.audio is None:
            return None
        if songs_before == 0:  # the others' length does not matter
            return (frames - kept) / self.tokens + frames / self.audio
        if self.song_frames is None:
            return None
        made = songs_before * self.song_frames + frames - kept
        decoded = songs_before * (self.decoded_frames or self.song_frames) + frames
        return made / self.tokens + decoded / self.audio

    def generating(self, progress: Progress, decoded: int = 0) -> float | None:
        """Seconds until a song is ready whose tokens are being made, at its own rate.

        `decoded` frames of it are audio already. The rest is taken to be decoded after its last token. Where both
        models stay on the device that makes the estimate a little late, and less so with every window.
        """
        if self.audio is None or not progress.rate or progress.rate < 0:
            return None
        return max(0, progress.total - progress.done) / progress.rate + max(0, progress.total - decoded) / self.audio

    def decoding(self, progress: Progress | None, frames: int, decoded: int = 0) -> float | None:
        """Seconds until a song of `frames` is ready whose audio is being made.

        `decoded` frames of it are stored. No progress: its decoding has not gone on since its last token.
        """
        if self.audio is None:
            return None
        done = frames * progress.done / max(progress.total, 1) if progress else 0.0
        return max(0.0, frames - max(done, decoded)) / self.audio


def pace(workers: Sequence[WorkerStatus]) -> Pace:
    """Add up the speeds in the heartbeats of live workers."""
    tokenizers = [worker for worker in workers if worker.role == "tokenizer"]
    codecs = [worker for worker in workers if worker.role == "codec"]
    return Pace(
        tokens=_sum(worker.rate for worker in tokenizers),
        audio=_sum(worker.rate for worker in codecs),
        song_frames=_mean(worker.song_frames for worker in tokenizers),
        decoded_frames=_mean(worker.song_frames for worker in codecs),
    )


def longest_frames(request: GenerateRequest) -> int:
    """The most frames that a song may have: its length is not known before its tokens are made."""
    return frames_within(request.max_duration_ms or 0)


def moved(before: float | None, after: float | None, now: float) -> bool:
    """Whether a new time of completion differs enough from the one last sent to be sent. Seconds since the epoch."""
    if before is None or after is None:
        return before is not after
    return abs(after - before) > max(_MOVED_SECONDS, _MOVED_SHARE * (before - now))


@dataclass(frozen=True)
class Expectation:
    """A song's place and its time of completion; None where they are unknown."""

    position: int | None = None  # songs before it, while it waits
    at: float | None = None  # when it will be completed, seconds since the epoch

    @classmethod
    def parse(cls, position: int | None, eta: str | None) -> "Expectation":
        """Read an expectation from the fields of an answer."""
        return cls(position, None if eta is None else datetime.fromisoformat(eta).timestamp())

    @property
    def eta(self) -> str | None:
        """`at` as an RFC 3339 time."""
        return None if self.at is None else timestamp(self.at)


class EtaEstimator:
    """Estimates for the songs of one gateway."""

    def __init__(self, positions: QueuePositions, workers: WorkerRegistry) -> None:
        self._positions, self._workers = positions, workers

    async def estimate(self, job: Job, progress: Progress | None = None, playable: float | None = None) -> Expectation:
        """Estimate place and ETA of a song, given its latest progress and how many seconds of it can be heard.

        None: as many as its record says. Of a song that waits for its time nothing is known. Raises `Unavailable`.
        """
        current = pace(await self._workers.live())
        decoded = frames_nearest(job.playable_seconds if playable is None else playable)
        position, seconds = None, None
        match job.status:
            case "queued" if not job.deferred:
                position = await self._positions.position(job)
                if position is not None:
                    kept = job.parent.frames if job.parent else 0
                    seconds = current.waiting(position, longest_frames(job.request), kept)
            case "generating" if progress and progress.status == "generating":
                seconds = current.generating(progress, decoded)
            case "decoding":
                steps = progress if progress and progress.status == "decoding" else None
                seconds = current.decoding(steps, job.frames or longest_frames(job.request), decoded)
        return Expectation(position, None if seconds is None else time.time() + seconds)

    async def estimate_accepted(self, job: Job, sequence: int) -> Expectation:
        """Estimate place and ETA of a song that was just accepted; `sequence` is that of its message, or 0 for none.

        Raises nothing: the song was accepted, whatever fails now.
        """
        try:
            if sequence:
                await self._positions.position(job, sequence)
            return await self.estimate(job)
        except Unavailable as error:
            log.info("%s: accepted, its place is not known: %s", job.job_id, error)
            return Expectation()


def _sum(rates: Iterable[float | None]) -> float | None:
    return sum(rate for rate in rates if rate and rate > 0) or None


def _mean(lengths: Iterable[float | None]) -> float | None:
    known = [length for length in lengths if length and length > 0]
    return fmean(known) if known else None
