"""The songs that wait for one stage: looking, fetching, claiming, and settling each message exactly once.

Deliveries are unlimited and attempts are counted in the job record, so that giving a song back costs it nothing.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import APIError

from shared.device.turn import Turn
from shared.errors import JobConflict, NewerRecord, ObjectError, QueueFull, SongError, Unavailable, Unreadable
from shared.jobs.events import EventPublisher, end_event
from shared.jobs.queues import queue_tokens
from shared.jobs.store import JobStore, change
from shared.nats.subjects import dead_subject, work_subject
from shared.schema.decoding import read_order
from shared.schema.job import ENDED, Job
from shared.storage.objects import ObjectStore
from shared.worker.job_context import JobContext, JobStopped
from shared.worker.stage import Stage
from shared.worker.turn_policy import lanes

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # errors that a song may raise
MAX_ATTEMPTS = 5  # workers that may die while working on a song without getting it any further
MAX_REMADE = 2  # times that the tokens of a song are made again
POLL = 1.0  # seconds between looks at the queue when nothing announces work
_TAKE_SECONDS = 2.0


class JobConsumer:
    """One stage's queue, as one worker sees it."""

    def __init__(
        self,
        nc: Client,
        js: JetStreamContext,
        stage: Stage,
        store: ObjectStore,
        *,
        ack_wait: float,  # seconds
        closing: threading.Event,  # nothing more is wanted
        wake: asyncio.Event,  # set when something may have come; ends `wait` early
        in_hand: Callable[[str], bool],  # whether this worker works on a song, by its id
        moved: Callable[[], None],  # called for every step of a song
    ) -> None:
        self.jobs, self.events = JobStore(js), EventPublisher(js)
        self._nc, self._js, self._stage, self._store = nc, js, stage, store
        self._ack_wait, self._closing, self._wake, self._in_hand = ack_wait, closing, wake, in_hand
        self._moved = moved
        self._told = False  # that a song waits
        self._last_probe = 0.0
        self._highs = 0  # songs of the high lane in a row

    async def open(self) -> None:
        """Listen for announcements of work."""

        async def on_work(_: Msg) -> None:
            self._told = True
            self._wake.set()

        await self._nc.subscribe(work_subject(self._stage.role), cb=on_work)

    # --- looking and fetching

    async def wait(self) -> None:
        """Return when songs wait, or when closing."""
        while not self._closing.is_set():
            self._wake.clear()
            if self._told:
                self._told = False
                return
            busy = False
            for name in self._stage.consumers.values():
                info = await self._js.consumer_info(self._stage.stream, name)
                if info.num_pending:
                    return
                busy = busy or bool(info.num_ack_pending)
            # A message that a dead worker held does not count as pending; only asking for it shows it.
            if busy and time.monotonic() - self._last_probe > self._ack_wait / 6:
                self._last_probe = time.monotonic()
                for name in self._stage.consumers.values():
                    if message := await self._take(name):
                        await message.nak()
                        return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL):
                    await self._wake.wait()

    async def next(self, turn: Turn) -> JobContext | None:
        """The next song that needs this stage, claimed under the turn's fencing token; None when none waits."""
        self._told = False
        while True:
            for lane in lanes(self._highs):
                name = self._stage.consumers.get(lane)
                if name is not None and (message := await self._take(name)):
                    self._highs = self._highs + 1 if lane == "high" else 0
                    break
            else:
                self._highs = 0
                return None
            if delivery := await self._claim(turn, message):
                return delivery

    async def _take(self, consumer: str) -> Msg | None:
        """One message if there is one. A pull request that waits would stall across a reconnect."""
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stage.stream}.{consumer}"
        # Old style, with a subscription of its own: a message arrives under its own subject, not the reply's.
        answer = await self._nc.request(subject, b'{"batch":1,"no_wait":true}', timeout=_TAKE_SECONDS, old_style=True)
        status = (answer.headers or {}).get("Status")
        if status is None:
            return answer
        if status in ("404", "408"):
            return None
        raise Unavailable("nats", f"the queue answers {status} {(answer.headers or {}).get('Description', '')}")

    async def _claim(self, turn: Turn, message: Msg) -> JobContext | None:
        try:
            order = read_order(message.subject, message.data, self._stage.order)
        except Unreadable as error:
            if error.newer:
                await self._leave_to_newer(message, message.subject)
            else:
                await self._bury(message, message.subject.rpartition(".")[2], f"not a job message: {error}")
            return None
        if self._in_hand(order.job_id):  # delivered twice; by then it will be clear what is left to do
            await message.nak(delay=1)
            return None
        seen: Job | None = None

        def claim(job: Job) -> Job:
            nonlocal seen
            seen = job
            if not self._stage.accepts(job):
                raise JobStopped(f"the song is {job.status} already")
            attempts = job.attempts + 1 if job.status == self._stage.status else 1
            if attempts > MAX_ATTEMPTS:
                raise SongError(f"its worker died {MAX_ATTEMPTS} times while working on it")
            return change(
                job,
                status=self._stage.status,
                fencing_token=turn.fencing_token,
                attempts=attempts,
                started_at=job.started_at or time.time(),
            )

        try:
            job = await self.jobs.update(order.job_id, order.tenant, claim)
        except NewerRecord as error:
            await self._leave_to_newer(message, f"{order.job_id}: {error}")
            return None
        except Unavailable:
            with contextlib.suppress(nats.errors.Error, APIError, TimeoutError):
                await message.nak(delay=2)
            raise
        except (JobStopped, JobConflict) as reason:  # ended, handed on, or its record expired
            log.info("%s: nothing to do, %s", order.job_id, reason)
            await self._finish_for(message, seen)
            return None
        except SongError as error:
            await self.fail(message, order.job_id, order.tenant, str(error))
            return None
        return JobContext(
            message,
            order,
            job,
            turn,
            jobs=self.jobs,
            events=self.events,
            alive_every=self._ack_wait / 3,
            moved=self._moved,
        )

    async def _leave_to_newer(self, message: Msg, why: str) -> None:
        log.warning("left for a newer worker: %s", why)
        await message.nak(delay=60)

    async def _finish_for(self, message: Msg, job: Job | None) -> None:
        """Do what a worker that died after its last write to the record may not have come to."""
        if job is not None and job.status in ENDED:
            await self.events.publish(job.tenant, end_event(job))
        elif job is not None and job.status == "queued":  # sent back for its tokens
            with contextlib.suppress(QueueFull):  # the sweeper finds a record without a message
                await queue_tokens(self._nc, job)
        await message.ack_sync()

    # --- settling

    async def give_back(self, delivery: JobContext, delay: float = 0, blameless: bool = True) -> None:
        """Into the queue again. If it was no fault of the song the attempt does not count."""

        def uncount(job: Job) -> Job:
            if job.fencing_token != delivery.turn.fencing_token:
                raise JobStopped("another worker has it, and with it the message")
            if not blameless or job.status in ENDED or not job.attempts:
                return job
            return change(job, attempts=job.attempts - 1)

        try:
            await self.jobs.update(delivery.job.job_id, delivery.job.tenant, uncount)
        except JobStopped as reason:
            log.info("%s: not given back, %s", delivery.job.job_id, reason)
            return
        except (JobConflict, Unavailable, nats.errors.Error, APIError, TimeoutError) as error:
            log.warning("%s: given back, but its attempt counts: %s", delivery.job.job_id, error)
        with contextlib.suppress(nats.errors.Error, APIError, TimeoutError):
            await delivery.message.nak(delay=delay or None)
            if not delay:
                await self._nc.publish(work_subject(self._stage.role))
            await self._nc.flush(1)
        log.info("%s: given back", delivery.job.job_id)

    async def send_back(self, delivery: JobContext, reason: str) -> None:
        """A song whose tokens are damaged or gone waits for new ones. Raises `SongError` when that was tried before."""

        def send_back(job: Job) -> Job:
            if job.status == "queued" and job.remade == delivery.job.remade + 1:  # we wrote it, the answer got lost
                return job
            if job.status != "decoding" or job.fencing_token != delivery.turn.fencing_token:
                raise JobStopped(f"the song is {job.status} and no longer ours")
            if job.remade >= MAX_REMADE:
                raise SongError(reason)
            return change(
                job,
                status="queued",
                remade=job.remade + 1,
                attempts=0,
                fencing_token=None,
                tokens_key=None,
                frames=None,
            )

        log.warning("%s: its tokens are made again, %s", delivery.job.job_id, reason)
        job = await self.jobs.update(delivery.job.job_id, delivery.job.tenant, send_back)
        # Our message goes first: while it is there, the next decode job of this song would be taken for a repetition.
        # If we die in between, the sweeper finds a record without a message.
        await delivery.message.ack_sync()
        with contextlib.suppress(QueueFull):  # the same
            await queue_tokens(self._nc, job)

    async def retry_or_fail(self, delivery: JobContext, error: Exception) -> bool:
        """Count an error against the song: it is tried again later, or has had its chances. Returns whether it has."""
        foreseen = isinstance(error, ObjectError | SongError)
        role = self._stage.role
        reason = str(error) if foreseen else f"the {role} worker failed: {str(error) or 'its log says how'}"
        failures = delivery.job.failures + 1
        log.exception("%s: failure %d of %d", delivery.job.job_id, failures, MAX_FAILURES)
        if failures >= MAX_FAILURES:
            await self.fail(delivery.message, delivery.job.job_id, delivery.job.tenant, reason)
            return True

        def remember(job: Job) -> Job:
            if job.status in ENDED or job.fencing_token != delivery.turn.fencing_token:
                return job
            return change(job, failures=failures, attempts=max(0, job.attempts - 1), error=reason)

        await self.jobs.update(delivery.job.job_id, delivery.job.tenant, remember)
        await delivery.message.nak(delay=2.0 ** (failures - 1))
        return False

    async def fail(self, message: Msg, job_id: str, tenant: str, reason: str) -> None:
        """The song ends here, with a reason in its record."""

        def fail(job: Job) -> Job:
            return job if job.status in ENDED else change(job, status="failed", error=reason)

        log.error("%s: failed, %s", job_id, reason)
        with contextlib.suppress(JobConflict):
            job = await self.jobs.update(job_id, tenant, fail)
            await self.events.publish(tenant, end_event(job))
        await self._bury(message, job_id, reason)
        with contextlib.suppress(Unavailable, ObjectError):
            await self._store.delete(f"tokens/{job_id}/")

    async def _bury(self, message: Msg, job_id: str, reason: str) -> None:
        """Keep a message that nobody can use where an operator finds it, and take it out of the queue."""
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in job_id) or "unknown"
        await self._js.publish(
            dead_subject(self._stage.role, name), message.data, headers={"Reason": " ".join(reason.split())[:500]}
        )
        await message.term()
