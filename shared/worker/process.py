"""A worker process: its stages are opened, run until a signal or a fault, and closed.

The event loop does all I/O; the engines run in one thread of their own, each lease in another.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from nats.aio.client import Client
from nats.aio.msg import Msg

from shared import tracing
from shared.aio import end
from shared.device.ledger import DeviceLedger
from shared.device.memory_plan import Placement
from shared.entrypoint import add_log_fields
from shared.errors import Unavailable
from shared.nats.connection import broker, connect
from shared.nats.errors import nats_errors
from shared.nats.streams import require_streams
from shared.settings import Settings
from shared.storage.objects import ObjectStore
from shared.storage.write_gate import WriteGate
from shared.waiting import wait_until_available
from shared.worker.draining import Draining
from shared.worker.listeners import Listeners
from shared.worker.metrics import Families
from shared.worker.stage import JobStage
from shared.worker.stage_service import ProcessParts, StageService, new_instance

log = logging.getLogger(__name__)

_START_SECONDS = 60.0  # that the servers may take to come up


class WorkerProcess:
    """One or more stages, on one place on a device, of whose memory they have one share: they take turns on it."""

    def __init__(self, settings: Settings, stages: Sequence[JobStage], placement: Placement) -> None:
        """The first stage gives the process its name. Raises `OSError` when the data folder cannot be written."""
        self._settings, device = settings, placement.device
        self._role, instances = stages[0].spec.role, [new_instance() for _ in stages]
        self._name = f"{self._role}-{instances[0]}"
        folder = settings.data_dir / "device" / device.gpu_id
        account = f"{self._role}.{instances[0]}"
        self._ledger = DeviceLedger(folder, account, device.capacity, placement.share, placement.way)
        self._store = ObjectStore(settings)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        wakes = [asyncio.Event() for _ in stages]  # of each: something may have come, ended or changed
        self._draining = Draining(*wakes)
        self._listeners, self._metrics = Listeners(), Families()
        parts = ProcessParts(
            settings=settings,
            placement=placement,
            ledger=self._ledger,
            store=self._store,
            gate=WriteGate(self._store),
            engine=self._executor,
            draining=self._draining,
            listeners=self._listeners,
            metrics=self._metrics,
        )
        self._services = [
            StageService(stage, parts, instance, wake)
            for stage, instance, wake in zip(stages, instances, wakes, strict=True)
        ]

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        Raises `ConfigError` or `Unavailable` when it cannot begin, `DeviceBroken` when it cannot go on.
        """
        settings = self._settings
        add_log_fields(role=lambda: self._role, phase=self._phase)
        tracing.start(f"heartmula-{self._role}")
        if settings.metrics_port:
            self._metrics.serve(settings.metrics_host, settings.metrics_port)
        nc = await self._connect()  # a signal ends the process until now: there is nothing to give back
        await self._open(nc)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._draining.begin)
        try:
            for service in self._services:
                await self._load(service.stage)
                await service.lease.start()
            await self._work()
        finally:
            await self._close(nc)

    async def _work(self) -> None:
        """Run all stages until they have drained. A task that dies takes the process with it."""
        turns = [asyncio.create_task(service.turn_loop.run()) for service in self._services]
        beats = [asyncio.create_task(service.heartbeat.run()) for service in self._services]
        await asyncio.wait({*turns, *beats}, return_when=asyncio.FIRST_COMPLETED)
        if self._draining.active:  # each stage gives its songs back
            await asyncio.wait(turns)
        await end(*turns, *beats)
        for task in (*turns, *beats):
            if not task.cancelled():
                task.result()

    def _phase(self) -> int | None:
        """The phase of the stage that has the device; at most one has."""
        turns = [service.state.turn for service in self._services if service.state.turn is not None]
        return turns[0].phase if turns else None

    async def _connect(self) -> Client:
        """Connect to NATS, and wait until both servers have what a worker needs."""
        settings, server = self._settings, broker(self._settings)
        nc = await wait_until_available(server, lambda: connect(settings, self._name), _START_SECONDS)
        try:
            await wait_until_available(server, lambda: require_streams(nc.jetstream()), _START_SECONDS)
            await wait_until_available(self._store.where, self._store.ensure_bucket, _START_SECONDS)
        except BaseException:
            await nc.close()
            raise
        return nc

    async def _open(self, nc: Client) -> None:
        async def on_cancel(message: Msg) -> None:
            for service in self._services:
                service.runner.cancel(message.subject.rpartition(".")[2])

        await self._listeners.open(nc)
        for service in self._services:
            await service.open(nc)
        with nats_errors("cancellations cannot be subscribed to"):
            await nc.subscribe("ctl.cancel.*", cb=on_cancel)

    async def _load(self, stage: JobStage) -> None:
        began = time.monotonic()
        await asyncio.get_running_loop().run_in_executor(self._executor, stage.load)
        log.info("%s: weights loaded in %.1f s", stage.model, time.monotonic() - began)

    async def _close(self, nc: Client) -> None:
        for service in self._services:
            await service.lease.close(release=self._draining.device_broken is None)
        for service in self._services:
            await service.heartbeat.remove()
        with contextlib.suppress(Unavailable), nats_errors("the connection cannot be closed"):
            await nc.close()
        self._executor.shutdown()
        self._store.close()
        self._ledger.close()
