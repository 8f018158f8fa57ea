"""A worker process: its parts are built here, opened, run until a signal or a fault, and closed.

The event loop does all I/O; the engine runs in one thread of its own, the lease in another.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from nats.aio.client import Client
from nats.aio.msg import Msg

from shared import tracing
from shared.aio import end
from shared.device.info import figures
from shared.device.lease import Lease
from shared.device.ledger import DeviceLedger
from shared.device.memory_plan import Placement
from shared.entrypoint import add_log_fields
from shared.errors import Unavailable
from shared.jobs.events import EventPublisher
from shared.jobs.store import JobStore
from shared.nats.connection import broker, connect
from shared.nats.errors import nats_errors
from shared.nats.streams import ack_wait, require_streams
from shared.settings import Settings, host_name
from shared.storage.objects import ObjectStore
from shared.storage.write_gate import WriteGate
from shared.waiting import wait_until_available
from shared.worker.draining import Draining
from shared.worker.heartbeat import Heartbeat
from shared.worker.job_consumer import JobConsumer
from shared.worker.job_runner import JobRunner
from shared.worker.job_settlement import JobSettlement
from shared.worker.listeners import Listeners
from shared.worker.metrics import WorkerMetrics
from shared.worker.model_residency import ModelResidency
from shared.worker.phase_memory import PhaseMemoryLog
from shared.worker.retry import Retry
from shared.worker.stage import JobStage
from shared.worker.state import WorkerState
from shared.worker.turn_loop import TurnLoop
from shared.worker.turn_policy import TurnPolicy
from shared.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

_START_SECONDS = 60.0  # that the servers may take to come up


class WorkerProcess:
    """One worker: a stage, on its place on a device."""

    def __init__(self, settings: Settings, stage: JobStage, placement: Placement) -> None:
        """Raises `OSError` when the data folder cannot be written."""
        role, device = stage.spec.role, placement.device
        self._settings, self._stage, self._placement = settings, stage, placement
        self._instance = f"{host_name()[:24]}-{os.getpid()}-{secrets.token_hex(3)}"
        folder = settings.data_dir / "device" / device.gpu_id
        account = f"{role}.{self._instance}"
        self._ledger = DeviceLedger(folder, account, device.capacity, placement.share, placement.way)
        self._lease = Lease(
            settings, gpu=device.gpu_id, role=role, instance=self._instance, exclusive=placement.exclusive
        )
        self._store = ObjectStore(settings)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._wake = asyncio.Event()  # something may have come, ended or changed
        self._draining = Draining(self._wake)
        self._state = WorkerState()
        self._metrics = WorkerMetrics(role)
        self._metrics.watch(lambda: stage.rate.all_frames, lambda: stage.rate.all_seconds)

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        Raises `ConfigError` or `Unavailable` when it cannot begin, `DeviceBroken` when it cannot go on.
        """
        settings, state = self._settings, self._state
        add_log_fields(role=lambda: self._stage.spec.role, phase=lambda: state.turn.phase if state.turn else None)
        tracing.start(f"heartmula-{self._stage.spec.role}")
        if settings.metrics_port:
            self._metrics.serve(settings.metrics_host, settings.metrics_port)
        nc = await self._connect()  # a signal ends the process until now: there is nothing to give back
        heartbeat, turn_loop = await self._open(nc)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._draining.begin)
        try:
            await self._load()
            await self._lease.start()
            # A task that dies takes the worker with it: half a worker is worse than none.
            tasks = {asyncio.create_task(heartbeat.run()), asyncio.create_task(turn_loop.run())}
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await end(*pending)
            for task in done:
                task.result()
        finally:
            await self._close(nc, heartbeat)

    async def _connect(self) -> Client:
        """Connect to NATS, and wait until both servers have what a worker needs."""
        settings, server = self._settings, broker(self._settings)
        name = f"{self._stage.spec.role}-{self._instance}"
        nc = await wait_until_available(server, lambda: connect(settings, name), _START_SECONDS)
        try:
            await wait_until_available(server, lambda: require_streams(nc.jetstream()), _START_SECONDS)
            await wait_until_available(self._store.where, self._store.ensure_bucket, _START_SECONDS)
        except BaseException:
            await nc.close()
            raise
        return nc

    async def _open(self, nc: Client) -> tuple[Heartbeat, TurnLoop]:
        """Build what needs a connection, and subscribe."""
        settings, stage, state, store = self._settings, self._stage, self._state, self._store
        js = nc.jetstream()
        jobs, events = JobStore(js), EventPublisher(js)
        memory = PhaseMemoryLog(lambda: figures(self._placement.device, self._ledger).memory_used)
        gate, listeners = WriteGate(store), Listeners()
        worker = WorkerContext(
            nc=nc,
            jobs=jobs,
            store=store,
            engine=self._executor,
            retry=Retry(self._draining, state.report),
            draining=self._draining,
            count_progress=state.count_progress,
            memory_used=lambda: memory.now,
            listeners=listeners,
            models_stay=self._placement.stays or settings.hybrid_mode,
            away=lambda: state.away,
        )
        residency = ModelResidency(
            stage,
            self._placement,
            self._ledger,
            in_engine=worker.in_engine,
            memory=memory,
            state=state,
            metrics=self._metrics,
        )
        settlement = JobSettlement(nc, js, stage.spec.role, jobs=jobs, events=events, store=store)
        runner = JobRunner(
            stage,
            worker,
            settlement,
            residency=residency,
            gate=gate,
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
            draining=self._draining,
            wake=self._wake,
            in_hand=runner.has,
            count_progress=state.count_progress,
        )
        turn_loop = TurnLoop(
            stage,
            js,
            self._lease,
            worker,
            consumer=consumer,
            runner=runner,
            settlement=settlement,
            residency=residency,
            store=store,
            gate=gate,
            policy=TurnPolicy(settings.turn_seconds),
            state=state,
            metrics=self._metrics,
            draining=self._draining,
            wake=self._wake,
        )
        heartbeat = Heartbeat(
            js,
            stage,
            self._placement,
            self._ledger,
            instance=self._instance,
            engine=settings.engine,
            runner=runner,
            memory=memory,
            state=state,
        )

        async def on_cancel(message: Msg) -> None:
            runner.cancel(message.subject.rpartition(".")[2])

        with nats_errors("cancellations cannot be subscribed to"):
            await nc.subscribe("ctl.cancel.*", cb=on_cancel)
        await listeners.open(nc)
        await consumer.open()
        return heartbeat, turn_loop

    async def _load(self) -> None:
        began = time.monotonic()
        await asyncio.get_running_loop().run_in_executor(self._executor, self._stage.load)
        log.info("%s: weights loaded in %.1f s", self._stage.model, time.monotonic() - began)

    async def _close(self, nc: Client, heartbeat: Heartbeat) -> None:
        await self._lease.close(release=self._draining.device_broken is None)
        await heartbeat.remove()
        with contextlib.suppress(Unavailable), nats_errors("the connection cannot be closed"):
            await nc.close()
        self._executor.shutdown()
        self._store.close()
        self._ledger.close()
