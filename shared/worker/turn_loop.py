"""Taking turns on the device: wait for songs, take the lease, work until the turn is over, release the lease.

One turn has five steps, numbered in `TurnLoop._take_turn`. When a turn ends is decided by `shared.worker.turn_policy`.
"""

import asyncio
import contextlib
import logging
import time

from nats.js import JetStreamContext

from shared.aio import end
from shared.causes import describe_error
from shared.device.lease import HeldLease, Lease
from shared.device.offload_phases import PLANS, Turn
from shared.errors import DeviceBroken, DeviceFull, LeaseLost, NotFound, Unavailable, WrongSequence
from shared.jobs.events import progress_of
from shared.schema.event import Stage
from shared.storage.objects import ObjectStore
from shared.storage.write_gate import WriteGate
from shared.worker.draining import Draining
from shared.worker.job_consumer import JobConsumer
from shared.worker.job_context import JobContext
from shared.worker.job_runner import JobRunner
from shared.worker.job_settlement import JobSettlement
from shared.worker.metrics import WorkerMetrics, timed
from shared.worker.model_residency import ModelResidency
from shared.worker.stage import JobStage
from shared.worker.state import WorkerState
from shared.worker.turn_policy import Decision, Situation, TurnPolicy
from shared.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

# A server that does not answer, or that refused with an error that no caller expected.
_SERVER_ERRORS = (Unavailable, NotFound, WrongSequence, TimeoutError)
_TICK_SECONDS = 0.25  # between two decisions when nothing happens
_FULL_SECONDS = 2.0  # before a model is tried again that the device had no room for
_FULL_SECONDS_OF_GUESTS = 30.0  # likewise for one that does not stay there: another one leaves for each try
_BACKLOG = 32  # songs off the device that may be unsettled before no further one is begun


class TurnLoop:
    """Serves one stage on one device until the worker drains."""

    def __init__(
        self,
        stage: JobStage,
        js: JetStreamContext,
        lease: Lease,
        worker: WorkerContext,
        *,
        consumer: JobConsumer,
        runner: JobRunner,
        settlement: JobSettlement,
        residency: ModelResidency,
        store: ObjectStore,
        gate: WriteGate,
        policy: TurnPolicy,
        state: WorkerState,
        metrics: WorkerMetrics,
        draining: Draining,
        wake: asyncio.Event,
    ) -> None:
        """`wake` is set when work is announced, a song leaves the device, or draining begins."""
        self._stage, self._js, self._lease, self._worker = stage, js, lease, worker
        self._consumer, self._runner, self._settlement, self._residency = consumer, runner, settlement, residency
        self._store, self._gate, self._policy = store, gate, policy
        self._state, self._metrics, self._draining, self._wake = state, metrics, draining, wake
        self._leaving = 0.0  # seconds that it took to leave the device at the end of the last turn

    async def run(self) -> None:
        """Take turns until draining, then wait for the songs in hand. Raises `DeviceBroken` when it cannot go on."""
        while not self._draining.active:
            try:
                await self._consumer.wait()
                if obstacle := self._residency.obstacle() or await self._stage.obstacle(self._js):
                    self._state.report(obstacle)
                    await asyncio.sleep(1)
                elif obstacle := await self._gate.obstacle():
                    self._state.report(obstacle)
                    await self._draining.sleep(self._gate.pause)
                elif len(self._runner) >= _BACKLOG:
                    await asyncio.sleep(_TICK_SECONDS)
                elif not self._draining.active:
                    await self._take_turn()
            except LeaseLost as error:
                log.warning("turn ended early: %s", error)
            except _SERVER_ERRORS as error:
                log.warning("NATS or the object store is away: %s", describe_error(error))
                await asyncio.sleep(1)
            except DeviceFull as error:
                pause = _FULL_SECONDS if self._stage.spec.may_stay else _FULL_SECONDS_OF_GUESTS
                self._state.report(f"waiting for memory on the device: {error}", pause)
                await self._draining.sleep(pause)
            except OSError as error:
                self._state.report(f"this worker cannot write: {error}")
                await asyncio.sleep(2)
        await self._runner.wait_settled()
        if self._draining.device_broken is not None:  # a supervisor starts a new process
            raise self._draining.device_broken

    async def _take_turn(self) -> None:
        plan = PLANS[self._stage.spec.role]
        # 1. Wait for the device.
        asked = time.monotonic()
        with timed(self._metrics.wait):
            held = await self._acquire()
        if held is None:
            return
        began = time.monotonic()
        turn = self._residency.turn(held)
        self._state.begin_turn(turn)
        self._runner.turn_error = None
        try:
            if self._draining.active:
                return
            # 2. Claim the first song.
            await self._residency.enter(turn, plan.load)
            first = await self._consumer.next(turn)
            if first is None:  # another worker was quicker
                return
            # 3. Move the model to the device.
            try:
                self._publish_loading(first)
                await self._residency.load(turn)
                await self._residency.enter(turn, plan.work)
                self._residency.begin(first.job)
            except BaseException:
                await self._settlement.give_back(first, delay=1)
                await first.close()
                raise
            # 4. Work on songs until the turn is over.
            self._state.away = self._policy.away(self._leaving + time.monotonic() - asked)
            await self._work(turn, held, first)
            await self._residency.enter(turn, plan.leave)
        finally:
            # 5. Move the model off the device and release the lease.
            leaving = time.monotonic()
            await self._leave(held)
            self._leaving = time.monotonic() - leaving
            self._metrics.turn.observe(time.monotonic() - began)

    async def _acquire(self) -> HeldLease | None:
        """Wait for the device; None when draining."""
        self._state.begin_waiting()
        acquiring = asyncio.create_task(self._lease.acquire())
        try:
            while not acquiring.done():
                await asyncio.wait({acquiring}, timeout=_TICK_SECONDS)
                if self._draining.active and not acquiring.done():
                    return None
            return acquiring.result()
        finally:
            self._state.end_waiting()
            await end(acquiring)

    def _publish_loading(self, context: JobContext) -> None:
        job = context.job
        if job.status != self._stage.spec.status:  # its stage is that of the other role still
            return
        context.publish(
            Stage(
                job_id=job.job_id,
                status=job.status,
                progress=progress_of(job),
                stage="loading",
                phase=PLANS[self._stage.spec.role].load,
                memory_used=self._residency.memory_used,
            )
        )

    async def _work(self, turn: Turn, held: HeldLease, first: JobContext) -> None:
        """Work on songs until the policy ends the turn and every song has left the device.

        Raises the error that ended the turn early.
        """
        began = time.monotonic()
        self._runner.start(first)
        more, looked = True, began
        while True:
            if self._wake.is_set() or time.monotonic() - looked > 1:
                self._wake.clear()
                more, looked = True, time.monotonic()
            decision = await self._decide(held, began, more)
            if decision is Decision.ADMIT:
                try:
                    context = await self._consumer.next(turn)
                except _SERVER_ERRORS as error:
                    self._runner.turn_error = error
                    continue
                more = context is not None
                if context is not None:
                    self._runner.start(context)
            elif decision is Decision.YIELD:
                break
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TICK_SECONDS):
                        await self._wake.wait()
        await self._runner.clear_device()
        if self._runner.turn_error is not None:
            raise self._runner.turn_error

    async def _decide(self, held: HeldLease, began: float, more: bool) -> Decision:
        """Decide what to do next. `began` is when work began (monotonic); `more` says whether songs may be waiting."""
        if self._draining.active or self._runner.turn_error is not None or not held.alive:
            return Decision.YIELD
        running = len(self._runner.on_device())
        unsettled = len(self._runner) - running
        others = [view for view in held.waiting() if view.role != self._stage.spec.role]
        asked = [view.since for view in others]
        lasted, away = time.monotonic() - began, self._state.away
        # Else nothing depends on listeners: an encoder helps none of them.
        cut = any(view.role != "encoder" for view in others) and self._policy.may_be_cut(lasted, away)
        return self._policy.decide(
            Situation(
                running=running,
                slots=self._stage.slots,
                waiting=more and unsettled < _BACKLOG and self._store.trouble is None,
                held=lasted,
                wanted=time.time() - min(asked) if asked else None,
                dry_in=await self._stage.dry_in(self._worker) if cut else None,
                away=away,
            )
        )

    async def _leave(self, held: HeldLease) -> None:
        """End a turn. Memory may be freed with or without a lease; the lease is released last.

        While it cannot be known that the device is free, the lease stays: this process has to end for that.
        """
        if self._draining.device_broken is None:
            try:
                await self._residency.unload()
            except Exception as error:
                self._draining.begin(DeviceBroken(f"the device could not be freed: {error}"))
        self._state.end_turn()
        self._residency.end_turn()
        if self._draining.device_broken is None:
            await held.release()
