"""Prometheus metrics of a worker, served by itself where `HEARTMULA_METRICS_PORT` is set. No song is a label."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from shared.errors import ConfigError
from shared.schema.decoding import UNREADABLE
from shared.write_failures import FAILED_WRITES

AttemptResult = Literal["done", "stopped", "handed_back", "tried_again", "failed"]

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 900)  # loading takes parts of a second, turns minutes

PARKED_BYTES = Gauge(
    "heartmula_worker_parked_bytes", "Host memory for the caches of songs that wait for their next turn", registry=None
)
RESUMED = Counter(
    "heartmula_worker_resumed",
    "Songs that went on, by their caches: parked (copied from host memory), shared (copied from another song that "
    "began alike) or prefilled (computed)",
    ["caches"],
    registry=None,
)
for _caches in ("parked", "shared", "prefilled"):
    RESUMED.labels(_caches)  # a figure that is 0 is shown too


class Families:
    """The metrics of one process, by role of its stages."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        for family in (FAILED_WRITES, UNREADABLE, PARKED_BYTES, RESUMED):
            self.registry.register(family)
        self.attempts = Counter(
            "heartmula_worker_attempts",
            "Songs that were worked on, by how that ended: done, stopped (cancelled, or another worker has it), "
            "handed_back (through no fault of their own), tried_again (after an error that they raised), failed",
            ["role", "outcome"],
            registry=self.registry,
        )
        self.redeliveries = Counter(
            "heartmula_worker_redeliveries",
            "Messages that were delivered for the second time or more",
            ["role"],
            registry=self.registry,
        )
        self.frames = Gauge(
            "heartmula_worker_frames", "Frames (80 ms of music) made since the start", ["role"], registry=self.registry
        )
        self.work = Gauge(
            "heartmula_worker_work_seconds",
            "Time spent on making frames; frames * 0.08 divided by it is the real-time factor",
            ["role"],
            registry=self.registry,
        )
        self.turn = self._histogram("turn", "How long a worker had the device")
        self.wait = self._histogram("lease_wait", "How long a worker waited for the device")
        self.load = self._histogram("load", "How long a model took to move onto the device")
        self.unload = self._histogram("unload", "How long a model took to leave the device")

    def _histogram(self, name: str, words: str) -> Histogram:
        return Histogram(f"heartmula_worker_{name}_seconds", words, ["role"], buckets=_SECONDS, registry=self.registry)

    def serve(self, host: str, port: int) -> None:
        """Serve the metrics from a thread of its own. Raises `ConfigError` when the port cannot be used."""
        try:
            start_http_server(port, host, self.registry)
        except OSError as error:
            raise ConfigError(f"HEARTMULA_METRICS_PORT: {host}:{port} cannot be used: {error.strerror}") from None


class WorkerMetrics:
    """The metrics of one role."""

    def __init__(self, role: str, families: Families) -> None:
        self.attempts = {name: families.attempts.labels(role, name) for name in get_args(AttemptResult)}
        self.redeliveries = families.redeliveries.labels(role)
        self._role, self._families = role, families
        self.turn, self.wait = families.turn.labels(role), families.wait.labels(role)
        self.load, self.unload = families.load.labels(role), families.unload.labels(role)

    def watch(self, frames: Callable[[], float], seconds: Callable[[], float]) -> None:
        """Read the frames made, and the seconds spent on them, from these functions."""
        self._families.frames.labels(self._role).set_function(frames)
        self._families.work.labels(self._role).set_function(seconds)


@contextmanager
def timed(histogram: Histogram) -> Iterator[None]:
    """Observe how many seconds the body took, however it ended."""
    began = time.monotonic()
    try:
        yield
    finally:
        histogram.observe(time.monotonic() - began)
