"""Whether songs wait, workers are there, and yet nothing moves, whatever the cause."""

from collections.abc import Sequence

from shared.schema.worker import WorkerStatus

TTLS = 12  # of the lease, after which a standstill is one: the longest wait that has a good reason is shorter


class StallDetector:
    """Judges by what workers say of themselves, not by records: one stands still while a long song is decoded."""

    def __init__(self, limit: float) -> None:
        """`limit` is in seconds."""
        self._limit = limit
        self._counts: dict[str, int] = {}  # steps and the like, by worker
        self._since: float | None = None  # monotonic; None while nothing has to move

    def look(self, workers: Sequence[WorkerStatus], songs: int, now: float) -> None:
        """Take note of the live workers and of how many songs are in the queues; to be called every few seconds."""
        counts = {worker.instance: worker.movement for worker in workers}
        # A new worker has moved nothing yet: one that ends again and again must not look like work.
        moved = any(count != self._counts.get(name, 0) for name, count in counts.items())
        self._counts = counts
        if not (songs and counts):
            self._since = None
        elif moved or self._since is None:
            self._since = now

    def seconds(self, now: float) -> float:
        """For how long nothing has moved though songs wait and workers are there."""
        return 0.0 if self._since is None else max(0.0, now - self._since)

    def problem(self, now: float) -> str | None:
        """A sentence, when that has lasted for too long."""
        seconds = self.seconds(now)
        if seconds < self._limit:
            return None
        return (
            f"songs wait, workers are there, and nothing has moved for {seconds:.0f} s: /api/gpu tells who holds the "
            "device, the workers' logs what they do"
        )
