"""The stall detector: finds out that songs wait and workers live but nothing moves, whatever the cause."""

from collections.abc import Sequence

from shared.schema.worker import WorkerStatus

TTLS = 12  # times the TTL of a lease, after which the system is stalled: no justified wait takes as long


class StallDetector:
    """Detects a stall by the movement that heartbeats report. Records do not change while a long song is decoded."""

    def __init__(self, limit: float) -> None:
        """`limit`: seconds without movement after which the system is stalled."""
        self._limit = limit
        self._counts: dict[str, int] = {}  # the movement of each worker: steps and the like
        self._since: float | None = None  # monotonic; None while nothing has to move

    def observe(self, workers: Sequence[WorkerStatus], songs: int, now: float) -> None:
        """Record the live workers and the number of songs in the queues. Call it every few seconds."""
        counts = {worker.instance: worker.movement for worker in workers}
        # A new worker counts from 0: workers that start and end again and again must not look like work.
        moved = any(count != self._counts.get(name, 0) for name, count in counts.items())
        self._counts = counts
        if not (songs and counts):
            self._since = None
        elif moved or self._since is None:
            self._since = now

    def seconds(self, now: float) -> float:
        """Seconds for which nothing has moved though songs wait and workers live."""
        return 0.0 if self._since is None else max(0.0, now - self._since)

    def problem(self, now: float) -> str | None:
        """A sentence if nothing has moved for too long, else None."""
        seconds = self.seconds(now)
        if seconds < self._limit:
            return None
        return (
            f"songs wait, workers are there, and nothing has moved for {seconds:.0f} s: /api/gpu shows which worker "
            "holds the device, and the workers' logs show what they do"
        )
