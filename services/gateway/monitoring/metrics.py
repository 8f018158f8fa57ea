"""Metrics for Prometheus. Labels are roles, devices and live workers, of which there are few, and never songs."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from litestar.types import ASGIApp, Message, Receive, Send
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.gateway.monitoring.health import Snapshot
from shared.schema.decoding import UNREADABLE
from shared.schema.worker import WorkerStatus
from shared.write_failures import FAILED_WRITES

_METHODS = {"GET", "HEAD", "POST", "DELETE", "OPTIONS"}
_WORKER = ["role", "instance", "device"]


@dataclass
class ReconcilerCounts:
    """What the reconciler of this gateway has done since its start."""

    rounds: int = 0
    failures: int = 0  # rounds that a server ended
    objects: int = 0  # deleted
    songs: int = 0  # queued again
    records: int = 0  # written again before they would expire


class Metrics:
    """The metrics of this gateway: its own counts, and values from the latest health snapshot."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.accepted = Counter("heartmula_songs_accepted", "Songs accepted by this gateway", registry=self._registry)
        self.refused = Counter(
            "heartmula_songs_refused", "Songs refused by this gateway", ["reason"], registry=self._registry
        )
        self.deferred = Gauge(
            "heartmula_songs_deferred",
            "Songs that wait for their time, in no queue: every gateway sees all",
            registry=self._registry,
        )
        self.recordings_accepted = Counter(
            "heartmula_recordings_accepted", "New recordings accepted by this gateway", registry=self._registry
        )
        self.recordings_refused = Counter(
            "heartmula_recordings_refused", "Uploads refused by this gateway", ["reason"], registry=self._registry
        )
        self.ended = Counter(
            "heartmula_songs_ended",
            "Songs that ended, whichever gateway accepted them: every gateway sees all",
            ["status"],
            registry=self._registry,
        )
        self.webhooks = Counter(
            "heartmula_webhooks",
            "Webhooks delivered, failed (and tried again) and given up",
            ["outcome"],
            registry=self._registry,
        )
        self.unanswered = Counter(
            "heartmula_nats_replies_refused",
            "Requests of NATS clients that were dropped, because they named no inbox to be answered in",
            registry=self._registry,
        )
        self._registry.register(UNREADABLE)
        self._requests = Histogram(
            "heartmula_http_request_seconds",
            "Until an answer began, by route, method and status",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self._sockets = Gauge("heartmula_websockets", "Open websockets", registry=self._registry)
        self._registry.register(FAILED_WRITES)
        self.reconciler = ReconcilerCounts()
        self._snapshots = _SnapshotCollector(self.reconciler)
        self._registry.register(self._snapshots)

    def measured(self, app: ASGIApp) -> ASGIApp:
        """Wrap the application so that its requests and websockets are counted."""

        async def measure(scope: Any, receive: Receive, send: Send) -> None:
            if scope["type"] == "websocket":
                with self._sockets.track_inprogress():
                    await app(scope, receive, send)
                return
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began = time.monotonic()

            async def note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # The route's template and known methods: what clients make up must not become a label.
                    route = scope.get("path_template") or "none"
                    method = scope["method"] if scope["method"] in _METHODS else "other"
                    seconds = time.monotonic() - began
                    self._requests.labels(route, method, str(message["status"])).observe(seconds)
                await send(message)

            await app(scope, receive, note)

        return measure

    def text(self, snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
        """All metrics and their media type, in the format that an Accept header asks for."""
        self._snapshots.snapshot = snapshot
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


class _SnapshotCollector(Collector):
    """Collector of metrics that are made at every request, so that a worker that is gone leaves none."""

    def __init__(self, reconciler: ReconcilerCounts) -> None:
        self.snapshot: Snapshot | None = None
        self._reconciler = reconciler

    def collect(self) -> Iterable[Metric]:
        """Make all metrics that are not counted as they happen."""
        yield from self._reconciling()
        if self.snapshot is not None:
            yield from _system(self.snapshot)
            yield from _devices(self.snapshot.workers)
            yield from _workers(self.snapshot.workers)

    def _reconciling(self) -> Iterable[Metric]:
        reconciler = self._reconciler
        for name, words, value in (
            ("rounds", "Rounds of the reconciler", reconciler.rounds),
            ("failures", "Rounds that a server ended", reconciler.failures),
            ("objects_deleted", "Objects that no song needed", reconciler.objects),
            ("songs_queued", "Songs that were in no queue and were queued again", reconciler.songs),
            ("records_renewed", "Records that would have expired before their song was made", reconciler.records),
        ):
            yield CounterMetricFamily(f"heartmula_sweeper_{name}", words, value=value)


def _system(snapshot: Snapshot) -> Iterable[Metric]:
    up = GaugeMetricFamily("heartmula_server_up", "Whether a server answers and takes writes", labels=["server"])
    up.add_metric(["nats"], snapshot.nats.ok)
    up.add_metric(["s3"], snapshot.object_store.ok)
    yield up
    queued = GaugeMetricFamily(
        "heartmula_queue_songs", "Songs, or recordings, that wait for a stage or are in it", labels=["queue"]
    )
    for queue, depth in (
        ("tokens", snapshot.queue.tokens),
        ("decode", snapshot.queue.decode),
        ("encode", snapshot.queue.encode),
    ):
        if depth is not None:
            queued.add_metric([queue], depth)
    yield queued
    if snapshot.queue.intake is not None:
        words = "Requests of NATS clients that are stored, and not yet submitted"
        yield GaugeMetricFamily("heartmula_intake_waiting", words, value=snapshot.queue.intake)
    oldest = GaugeMetricFamily(
        "heartmula_queue_oldest_seconds",
        "Age of the oldest message in a queue since it was published",
        labels=["queue"],
    )
    for name, seconds in snapshot.ages.items():
        oldest.add_metric([name], seconds)
    yield oldest
    yield GaugeMetricFamily(
        "heartmula_standstill_seconds",
        "Time for which nothing has moved although songs wait and workers live",
        value=snapshot.stalled_seconds,
    )
    yield GaugeMetricFamily(
        "heartmula_stalled", "Whether the standstill is too long", value=snapshot.stalled is not None
    )
    live = GaugeMetricFamily("heartmula_workers", "Live workers", labels=["role"])
    for role in ("tokenizer", "codec"):
        live.add_metric([role], sum(worker.role == role for worker in snapshot.workers))
    yield live


def _devices(workers: list[WorkerStatus]) -> Iterable[Metric]:
    used = GaugeMetricFamily("heartmula_device_memory_used_bytes", "Memory in use on a device", labels=["device"])
    total = GaugeMetricFamily("heartmula_device_memory_total_bytes", "Memory of a device", labels=["device"])
    latest = {worker.gpu.id: worker.gpu for worker in sorted(workers, key=lambda worker: worker.sent)}
    for device, figures in latest.items():
        used.add_metric([device], figures.memory_used)
        total.add_metric([device], figures.memory_total)
    yield from (used, total)


def _workers(workers: list[WorkerStatus]) -> Iterable[Metric]:
    songs = GaugeMetricFamily("heartmula_worker_songs", "Songs that a worker works on", labels=_WORKER)
    slots = GaugeMetricFamily("heartmula_worker_slots", "Songs that a worker can work on at once", labels=_WORKER)
    failed = GaugeMetricFamily(
        "heartmula_worker_failed_writes",
        "Writes of a worker that a server refused or did not confirm, since its start",
        labels=_WORKER,
    )
    rate = GaugeMetricFamily(
        "heartmula_worker_frames_per_second", "Recent rate of all songs of a worker together", labels=_WORKER
    )
    memory = GaugeMetricFamily(
        "heartmula_phase_memory_bytes",
        "At the two ends of a phase of the latest turn: of the device, and of the process at its begin (host)",
        labels=[*_WORKER, "phase", "at"],
    )
    for worker in workers:
        labels = [worker.role, worker.instance, worker.gpu.id]
        songs.add_metric(labels, len(worker.jobs))
        slots.add_metric(labels, worker.slots)
        failed.add_metric(labels, worker.failed_writes)
        if worker.rate is not None:
            rate.add_metric(labels, worker.rate)
        for phase in {item.phase: item for item in worker.memory}.values():
            ends = {"before": phase.device_before, "after": phase.device_after, "host": phase.host}
            for at, value in ends.items():
                if value is not None:
                    memory.add_metric([*labels, str(phase.phase), at], value)
    yield from (songs, slots, failed, rate, memory)
