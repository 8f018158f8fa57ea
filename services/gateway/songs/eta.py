"""What a song's listeners may expect: its place in the queue, and when it will be ready."""

import logging
import time
from dataclasses import dataclass
from datetime import datetime

from services.gateway.monitoring.worker_registry import Workers
from services.gateway.songs.forecast import longest_frames, pace
from services.gateway.songs.queue_position import QueuePositions
from shared.errors import Unavailable
from shared.schema.base import timestamp
from shared.schema.event import Progress
from shared.schema.job import Job

log = logging.getLogger(__name__)


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
