"""The songs in hand of a worker, each in a task of its own, from its claim until its message is settled."""

import asyncio
import logging
import time

from shared.errors import DeviceBroken, DeviceFull, SongError
from shared.jobs.claims import claim_of
from shared.storage.keys import song_prefixes
from shared.storage.write_gate import WriteGate
from shared.tracing import record_wait, span
from shared.worker.job_context import JobContext
from shared.worker.job_settlement import JobSettlement
from shared.worker.metrics import AttemptResult, WorkerMetrics
from shared.worker.model_residency import ModelResidency
from shared.worker.outcome import MAX_FAILURES, Outcome, Settlement, classify
from shared.worker.stage import JobStage
from shared.worker.state import WorkerState
from shared.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)


class JobRunner:
    """The songs in hand. A song that has left the device is stored and handed on while the next one is on it."""

    def __init__(
        self,
        stage: JobStage,
        worker: WorkerContext,
        settlement: JobSettlement,
        *,
        residency: ModelResidency,
        gate: WriteGate,
        state: WorkerState,
        metrics: WorkerMetrics,
        wake: asyncio.Event,
    ) -> None:
        """`wake` is set whenever a song leaves the device."""
        self.turn_error: Exception | None = None  # why no further song may begin and the turn should end
        self._stage, self._worker, self._settlement = stage, worker, settlement
        self._residency, self._gate, self._state = residency, gate, state
        self._metrics, self._wake = metrics, wake
        self._tasks: dict[JobContext, asyncio.Task[None]] = {}  # until settled

    def __len__(self) -> int:
        """Number of songs in hand, including those that have left the device and are not settled yet."""
        return len(self._tasks)

    def has(self, job_id: str) -> bool:
        """Whether a song is in hand."""
        return any(context.job.job_id == job_id for context in self._tasks)

    def on_device(self) -> list[JobContext]:
        """Songs that use the device."""
        return [context for context in self._tasks if not context.off_device.is_set()]

    def start(self, context: JobContext) -> None:
        """Begin to work on a claimed song."""
        task = asyncio.create_task(self._run(context))
        left = asyncio.create_task(context.off_device.wait())
        self._tasks[context] = task
        self._state.changed.set()

        def settled(task: asyncio.Task[None]) -> None:
            context.off_device.set()
            del self._tasks[context]
            self._state.changed.set()
            if not task.cancelled() and (error := task.exception()):
                log.error("%s: not settled, its message will be delivered again: %r", context.job.job_id, error)

        task.add_done_callback(settled)
        left.add_done_callback(lambda _: self._wake.set())

    def cancel(self, job_id: str) -> None:
        """Stop a song at its next step, if it is in hand."""
        for context in self._tasks:
            if context.job.job_id == job_id:
                context.stop()

    async def clear_device(self) -> None:
        """Pause every song that is on the device, and wait until all have left it."""
        for context in self.on_device():
            context.pause()
        for context in self.on_device():
            await context.off_device.wait()

    async def wait_settled(self) -> None:
        """Wait until the messages of all songs are settled."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    # --- one song

    async def _run(self, context: JobContext) -> None:
        job_id, message, status = context.job.job_id, context.message, self._stage.spec.status
        began = time.monotonic()
        result: AttemptResult = "handed_back"  # also where the settlement fails: the message comes again
        if message.redelivered:
            self._metrics.redeliveries.inc()
        log.info("%s: %s begins", job_id, status)
        record_wait("wait", message.headers, message.queued_at)
        try:
            with span(status, message.headers, job_id=job_id):
                await self._stage.run(context, self._worker)
            await self._worker.retry(message.acknowledge)
            await self._stage.settled(context, self._worker)
            result = "done"
            self._residency.forget(job_id)
            self._state.count_progress()
            log.info("%s: %s done in %.2f s", job_id, status, time.monotonic() - began)
        except Exception as error:
            outcome = self._classify(error, context)
            if outcome.settlement is Settlement.CLEAR_AWAY:
                result = outcome.result  # whether or not its objects can be deleted
            self._apply_to_worker(outcome, error)
            result = await self._settle(outcome, error, context)
        finally:
            self._metrics.attempts[result].inc()
            context.off_device.set()
            await context.close()

    def _classify(self, error: Exception, context: JobContext) -> Outcome:
        if isinstance(error, DeviceFull):
            memory = self._residency.memory_for(context.job)
        else:
            memory = None
            self._residency.forget(context.job.job_id)
        failures = claim_of(context.job, context.role).failures
        return classify(error, role=self._stage.spec.role, failures=failures, memory=memory)

    def _apply_to_worker(self, outcome: Outcome, error: Exception) -> None:
        if outcome.breaks_device and isinstance(error, DeviceBroken):
            self._worker.draining.begin(error)
        if outcome.problem:
            self._state.report(outcome.problem, outcome.delay)
        if outcome.ends_turn:
            self.turn_error = error
        if outcome.doubts_store:
            self._gate.doubt()

    async def _settle(self, outcome: Outcome, error: Exception, context: JobContext) -> AttemptResult:
        """Carry out an outcome. Returns how the attempt is counted."""
        job = context.job
        if outcome.failures is not None:
            log.error("%s: failure %d of %d", job.job_id, outcome.failures, MAX_FAILURES, exc_info=error)
        match outcome.settlement:
            case Settlement.CLEAR_AWAY:
                log.info("%s: stopped, %s", job.job_id, outcome.reason)
                await self._clear_away(context)
            case Settlement.GIVE_BACK:
                await self._settlement.give_back(context, outcome.delay, outcome.attempt_counts)
            case Settlement.REMAKE_TOKENS:
                try:
                    await self._worker.retry(lambda: self._settlement.remake_tokens(context, outcome.reason))
                except SongError as hopeless:
                    await self._settlement.fail(context.message, job.job_id, job.tenant, str(hopeless))
                    return "failed"
            case Settlement.RETRY:
                assert outcome.failures is not None
                await self._settlement.retry_later(context, outcome.failures, outcome.reason, outcome.delay)
            case Settlement.FAIL:
                await self._settlement.fail(context.message, job.job_id, job.tenant, outcome.reason)
        return outcome.result

    async def _clear_away(self, context: JobContext) -> None:
        """Delete the objects of a cancelled song. Those of a song that another worker has now belong to that one.

        A recording's are left to the gateway that cancelled it: the same upload, under the same keys, may be back.
        """
        worker = self._worker
        job = await worker.retry(lambda: worker.jobs.get(context.job.job_id, context.job.tenant))
        if job is not None and job.status in self._stage.spec.accepts:
            await self._settlement.leave(context, job)
            return
        if job is not None and job.status == "cancelled" and job.recording is None:
            for prefix in song_prefixes(job.job_id):
                await worker.retry(lambda prefix=prefix: worker.store.delete(prefix))  # type: ignore[misc]
        await context.message.acknowledge()
