"""Heartbeats: the description and state of a worker, in the WORKERS bucket for as long as it lives."""

import asyncio
import contextlib
import os
import time

import msgspec
from nats.js import JetStreamContext

from shared.device.info import figures
from shared.device.ledger import DeviceLedger
from shared.device.memory_plan import Placement
from shared.errors import NotFound, Unavailable
from shared.nats.errors import nats_errors
from shared.nats.streams import WORKER_TTL
from shared.nats.subjects import WORKERS
from shared.schema.worker import WorkerStatus
from shared.settings import host_name
from shared.worker.job_runner import JobRunner
from shared.worker.phase_memory import PhaseMemoryLog
from shared.worker.stage import JobStage
from shared.worker.state import WorkerState
from shared.write_failures import write_failed, writes_failed

_INTERVAL = WORKER_TTL / 5  # seconds
_LEAST_INTERVAL = 0.25  # seconds; turns can be shorter under load


class Heartbeat:
    """Publishes a `WorkerStatus` at intervals, and whenever the worker's state changes."""

    def __init__(
        self,
        js: JetStreamContext,
        stage: JobStage,
        placement: Placement,
        ledger: DeviceLedger,
        *,
        instance: str,
        engine: str,
        runner: JobRunner,
        memory: PhaseMemoryLog,
        state: WorkerState,
    ) -> None:
        """`instance` names the worker; `engine` is the name of its kind of engine in the settings."""
        self._js, self._stage, self._placement, self._ledger = js, stage, placement, ledger
        self._instance, self._engine = instance, engine
        self._runner, self._memory, self._state = runner, memory, state
        self._subject = f"$KV.{WORKERS}.{stage.spec.role}.{instance}"

    async def run(self) -> None:
        """Publish until cancelled. A heartbeat that cannot be published is counted as a failed write."""
        while True:
            status = msgspec.json.encode(self._status())
            try:
                with nats_errors("a heartbeat cannot be published"):
                    await self._js.publish(self._subject, status, timeout=2)
            except (Unavailable, NotFound):
                write_failed("nats")
            self._state.changed.clear()
            await asyncio.sleep(_LEAST_INTERVAL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL):
                    await self._state.changed.wait()

    async def remove(self) -> None:
        """Remove the worker from the bucket, if NATS can be reached."""
        with contextlib.suppress(Unavailable, NotFound), nats_errors("a worker cannot be removed"):
            await self._js.publish(self._subject, b"", timeout=1, headers={"KV-Operation": "DEL"})

    def _status(self) -> WorkerStatus:
        state, stage = self._state, self._stage
        return WorkerStatus(
            role=stage.spec.role,
            instance=self._instance,
            host=host_name(),
            pid=os.getpid(),
            engine=self._engine,
            model=stage.model,
            gpu=figures(self._placement.device, self._ledger),
            state=state.activity,
            phase=state.turn.phase if state.turn else None,
            resident=[resident.label for resident in self._ledger.residents()],
            jobs=[context.job.job_id for context in self._runner.on_device()],
            slots=stage.slots,
            rate=stage.rate.per_second,
            song_frames=stage.rate.song_frames,
            memory=self._memory.phases,
            plan=self._placement.plan,
            notes=list(stage.notes),
            problem=state.problem,
            movement=state.progress(),
            failed_writes=writes_failed(),
            since=state.since,
            sent=time.time(),
        )
