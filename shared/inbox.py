"""The songs that wait for one stage: looking, fetching, claiming, and settling each message exactly once.

Deliveries are unlimited and attempts are counted in the job record, so that giving a song back costs it nothing.
"""

import asyncio
import contextlib
import logging
import threading
import time

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import APIError

from shared.delivery import Delivery, JobStopped
from shared.errors import JobConflict, ObjectError, SongError, Unavailable
from shared.events import EventPublisher
from shared.jobs import JobStore, change
from shared.messages import ENDED, SCHEMA, Failed, Job
from shared.objects import ObjectStore
from shared.phases import Turn
from shared.stage import Stage
from shared.topology import dead_subject

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
POLL = 1.0  # seconds between looks at the queue when nothing announces work


class Inbox:
    """One stage's queue, as one worker sees it."""

    def __init__(
        self,
        nc: Client,
        js: JetStreamContext,
        stage: Stage,
        store: ObjectStore,
        *,
        ack_wait: float,  # seconds
        closing: threading.Event,  # nothing more is wanted; deliveries stop at their next check
        wake: asyncio.Event,  # ends `wait` early
    ) -> None:
        self.jobs, self.events = JobStore(js), EventPublisher(js)
        self._nc, self._js, self._stage, self._store = nc, js, stage, store
        self._ack_wait, self._closing, self._wake = ack_wait, closing, wake
        self._last_probe = 0.0
        self._pulls: dict[str, JetStreamContext.PullSubscription] = {}

    async def open(self) -> None:
        """Listen for announcements of work."""

        async def on_work(_: Msg) -> None:
            self._wake.set()

        await self._nc.subscribe(self._stage.wake_subject, cb=on_work)

    async def wait(self) -> Msg | None:
        """Return when a song waits; with its message where it had been given to a worker before."""
        while not self._closing.is_set():
            self._wake.clear()
            busy = False
            for name in self._stage.consumers:
                info = await self._js.consumer_info(self._stage.stream, name)
                if info.num_pending:
                    return None
                busy = busy or bool(info.num_ack_pending)
            # A message that a dead worker held does not count as pending; only asking for it shows it.
            if busy and time.monotonic() - self._last_probe > self._ack_wait / 6:
                self._last_probe = time.monotonic()
                for name in self._stage.consumers:
                    if message := await self._fetch_from(name, 0.2):
                        return message
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL):
                    await self._wake.wait()
        return None

    async def _fetch(self) -> Msg | None:
        for name in self._stage.consumers:
            info = await self._js.consumer_info(self._stage.stream, name)
            if info.num_pending and (message := await self._fetch_from(name, 1.0)):
                return message
        return None

    async def _fetch_from(self, consumer: str, timeout: float) -> Msg | None:
        # One message and a short wait: larger or longer fetches stall across a reconnect.
        if consumer not in self._pulls:
            self._pulls[consumer] = await self._js.pull_subscribe_bind(consumer, self._stage.stream)
        try:
            return (await self._pulls[consumer].fetch(1, timeout=timeout))[0]
        except TimeoutError:
            return None

    async def next(self, turn: Turn, message: Msg | None) -> Delivery | None:
        """The next song that needs this stage, claimed under the turn's fencing token."""
        while (message := message or await self._fetch()) is not None:
            delivery = await self._claim(turn, message)
            if delivery is not None:
                return delivery
            message = None
        return None

    async def _claim(self, turn: Turn, message: Msg) -> Delivery | None:
        try:
            order = msgspec.json.decode(message.data, type=self._stage.order)
        except msgspec.DecodeError as error:
            await self._bury(message, message.subject.rpartition(".")[2], f"not a job message: {error}")
            return None
        if order.schema > SCHEMA:
            log.warning("left for a newer worker: %s has schema %d", order.job_id, order.schema)
            await message.nak(delay=60)
            return None

        def claim(job: Job) -> Job:
            if not self._stage.accepts(job):
                raise JobStopped(f"the song is {job.status} already")
            attempts = job.attempts + 1 if job.status == self._stage.status else 1
            if attempts > MAX_ATTEMPTS:
                raise SongError(job.error or f"its worker died {MAX_ATTEMPTS} times while working on it")
            return change(
                job,
                status=self._stage.status,
                fence=turn.fence,
                attempts=attempts,
                started_at=job.started_at or time.time(),
            )

        try:
            job = await self.jobs.update(order.job_id, order.tenant, claim)
        except (JobStopped, JobConflict) as reason:  # ended, handed on, or its record expired
            log.info("%s: nothing to do, %s", order.job_id, reason)
            await message.ack_sync()
            return None
        except SongError as error:
            await self.fail(message, order.job_id, order.tenant, str(error))
            return None
        return Delivery(
            message,
            order,
            job,
            turn,
            jobs=self.jobs,
            events=self.events,
            draining=self._closing,
            alive_every=self._ack_wait / 3,
        )

    async def give_back(self, delivery: Delivery) -> None:
        """Into the queue again, through no fault of the song: the attempt does not count."""

        def uncount(job: Job) -> Job:
            if job.fence != delivery.job.fence or job.status in ENDED:
                return job
            return change(job, attempts=max(0, job.attempts - 1))

        with contextlib.suppress(JobConflict, Unavailable, nats.errors.Error, APIError, TimeoutError):
            await self.jobs.update(delivery.job.job_id, delivery.job.tenant, uncount)
        with contextlib.suppress(nats.errors.Error, APIError, TimeoutError):
            await delivery.message.nak()
            await self._nc.flush(1)
        log.info("%s: given back", delivery.job.job_id)

    async def retry_or_fail(self, delivery: Delivery, error: Exception) -> None:
        reason = str(error) if isinstance(error, ObjectError) else f"{type(error).__name__}: {error}"
        job = delivery.job
        log.exception("%s: attempt %d failed", job.job_id, job.attempts)
        if job.attempts >= MAX_ATTEMPTS:
            await self.fail(delivery.message, job.job_id, job.tenant, reason)
            return

        def remember(record: Job) -> Job:
            return record if record.status in ENDED else change(record, error=reason)

        await self.jobs.update(job.job_id, job.tenant, remember)
        await delivery.message.nak(delay=2.0**job.attempts)

    async def fail(self, message: Msg, job_id: str, tenant: str, reason: str) -> None:
        """The song ends here, with a reason in its record."""

        def fail(job: Job) -> Job:
            return job if job.status in ENDED else change(job, status="failed", error=reason)

        log.error("%s: failed, %s", job_id, reason)
        with contextlib.suppress(JobConflict):
            job = await self.jobs.update(job_id, tenant, fail)
            if job.status == "failed":
                await self.events.publish(tenant, Failed(job_id=job_id, status="failed", progress=0, error=reason))
        await self._bury(message, job_id, reason)
        with contextlib.suppress(Unavailable, ObjectError):
            await self._store.delete(f"tokens/{job_id}/")

    async def _bury(self, message: Msg, job_id: str, reason: str) -> None:
        """Keep a message that nobody can use where an operator finds it, and take it out of the queue."""
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in job_id) or "unknown"
        await self._js.publish(
            dead_subject(self._stage.role, name), message.data, headers={"Reason": reason.replace("\n", " ")[:500]}
        )
        await message.term()
