"""One stage of a worker process: all that it has of its own, and what it shares with the others of its process."""

import asyncio
import os
import secrets
from concurrent.futures import Executor
from dataclasses import dataclass, field

from nats.aio.client import Client

from shared.device.info import figures
from shared.device.lease import Lease
from shared.device.ledger import DeviceLedger
from shared.device.memory_plan import Placement
from shared.jobs.events import EventPublisher
from shared.jobs.store import JobStore
from shared.nats.streams import ack_wait
from shared.settings import Settings, host_name
from shared.storage.objects import ObjectStore
from shared.storage.write_gate import WriteGate
from shared.worker.draining import Draining
from shared.worker.heartbeat import Heartbeat
from shared.worker.job_consumer import JobConsumer
from shared.worker.job_runner import JobRunner
from shared.worker.job_settlement import JobSettlement
from shared.worker.listeners import Listeners
from shared.worker.metrics import Families, WorkerMetrics
from shared.worker.model_residency import ModelResidency
from shared.worker.phase_memory import PhaseMemoryLog
from shared.worker.retry import Retry
from shared.worker.stage import JobStage
from shared.worker.state import WorkerState
from shared.worker.turn_loop import TurnLoop
from shared.worker.turn_policy import TurnPolicy
from shared.worker.worker_context import WorkerContext


@dataclass(frozen=True, kw_only=True)
class ProcessParts:
    """What all stages of a process share."""

    settings: Settings
    placement: Placement
    ledger: DeviceLedger
    store: ObjectStore
    gate: WriteGate
    engine: Executor  # one thread, in which all engines run
    draining: Draining
    listeners: Listeners
    metrics: Families
    models: list[ModelResidency] = field(default_factory=list)


def new_instance() -> str:
    """The name of a worker: its host and its process, and what tells it from others there."""
    return f"{host_name()[:24]}-{os.getpid()}-{secrets.token_hex(3)}"


class StageService:
    """A stage with its queue, its songs in hand, its lease, its turns and its heartbeat: a worker, for all others."""

    def __init__(self, stage: JobStage, parts: ProcessParts, instance: str, wake: asyncio.Event) -> None:
        """`instance` is its name; `wake` is set when draining begins."""
        role, placement = stage.spec.role, parts.placement
        self.stage, self.state = stage, WorkerState()
        self._parts, self._instance, self._wake = parts, instance, wake
        self.lease = Lease(
            parts.settings,
            gpu=placement.device.gpu_id,
            role=role,
            instance=instance,
            exclusive=placement.exclusive,
        )
        self._metrics = WorkerMetrics(role, parts.metrics)
        self._metrics.watch(lambda: stage.rate.all_frames, lambda: stage.rate.all_seconds)
        self.runner: JobRunner  # from `open` on, as what follows
        self.turn_loop: TurnLoop
        self.heartbeat: Heartbeat

    async def open(self, nc: Client) -> None:
        """Build what needs a connection, and subscribe. Raises `Unavailable`."""
        parts, stage, settings = self._parts, self.stage, self._parts.settings
        js, state = nc.jetstream(), self.state
        jobs, events = JobStore(js), EventPublisher(js)
        memory = PhaseMemoryLog(lambda: figures(parts.placement.device, parts.ledger).memory_used)
        worker = self._context(nc, jobs, memory)
        residency = ModelResidency(
            stage,
            parts.placement,
            parts.ledger,
            in_engine=worker.in_engine,
            memory=memory,
            state=state,
            metrics=self._metrics,
            models=parts.models,
        )
        settlement = JobSettlement(nc, js, stage.spec.role, jobs=jobs, events=events, store=parts.store)
        self.runner = JobRunner(
            stage,
            worker,
            settlement,
            residency=residency,
            gate=parts.gate,
            state=state,
            metrics=self._metrics,
            wake=self._wake,
        )
        consumer = JobConsumer(
            nc,
            js,
            stage.spec,
            settlement,
            jobs=jobs,
            events=events,
            ack_wait=ack_wait(settings),
            draining=parts.draining,
            wake=self._wake,
            in_hand=self.runner.has,
            count_progress=state.count_progress,
        )
        self.turn_loop = TurnLoop(
            stage,
            js,
            self.lease,
            worker,
            consumer=consumer,
            runner=self.runner,
            settlement=settlement,
            residency=residency,
            store=parts.store,
            gate=parts.gate,
            policy=TurnPolicy(settings.turn_seconds),
            state=state,
            metrics=self._metrics,
            draining=parts.draining,
            wake=self._wake,
        )
        self.heartbeat = Heartbeat(
            js,
            stage,
            parts.placement,
            parts.ledger,
            instance=self._instance,
            engine=settings.engine,
            runner=self.runner,
            memory=memory,
            state=state,
        )
        await consumer.open()

    def _context(self, nc: Client, jobs: JobStore, memory: PhaseMemoryLog) -> WorkerContext:
        parts, state = self._parts, self.state
        return WorkerContext(
            nc=nc,
            jobs=jobs,
            store=parts.store,
            engine=parts.engine,
            retry=Retry(parts.draining, state.report),
            draining=parts.draining,
            count_progress=state.count_progress,
            memory_used=lambda: memory.now,
            listeners=parts.listeners,
            models_stay=parts.placement.stays or parts.settings.hybrid_mode,
            away=lambda: state.away,
        )
