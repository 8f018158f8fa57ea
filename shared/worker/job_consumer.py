"""The queue of one stage, as one worker consumes it: wait for songs, fetch a message, claim its song.

Deliveries are unlimited and attempts are counted in the job record, so that giving a song back costs it nothing.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from shared.device.offload_phases import Turn
from shared.errors import JobConflict, NewerRecord, SongError, Unavailable, Unreadable
from shared.jobs.claims import claim_of, with_claim
from shared.jobs.events import EventPublisher
from shared.jobs.store import JobStore
from shared.nats.errors import nats_errors
from shared.nats.subjects import decode_lane, work_subject
from shared.schema.decoding import read_order
from shared.schema.job import DecodeJob, Job, TokenJob
from shared.schema.request import Priority
from shared.worker.draining import Draining
from shared.worker.job_context import JobContext
from shared.worker.job_settlement import JobSettlement
from shared.worker.message import QueueMessage
from shared.worker.signals import JobStopped
from shared.worker.stage import StageSpec
from shared.worker.turn_policy import lanes

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 5  # workers that may die while working on a song without getting it any further
_POLL_SECONDS = 1.0  # between two looks at the queue when no work is announced
_FETCH_SECONDS = 2.0
_EMPTY_SECONDS = 1.0  # for which a high lane that was empty counts as empty, unless work in it is announced


class JobConsumer:
    """Finds the songs that wait for a stage."""

    def __init__(
        self,
        nc: Client,
        js: JetStreamContext,
        spec: StageSpec,
        settlement: JobSettlement,
        *,
        jobs: JobStore,
        events: EventPublisher,
        ack_wait: float,
        draining: Draining,
        wake: asyncio.Event,
        in_hand: Callable[[str], bool],
        count_progress: Callable[[], None],
    ) -> None:
        """`ack_wait` is the consumers' time until redelivery, in seconds; `wake` is set when work is announced.

        `in_hand` says of a job id whether this worker is working on that song.
        """
        self._nc, self._js, self._spec, self._settlement = nc, js, spec, settlement
        self._jobs, self._events = jobs, events
        self._ack_wait, self._draining, self._wake, self._in_hand = ack_wait, draining, wake, in_hand
        self._count_progress = count_progress
        self._announced = False  # a song waits
        self._last_probe = 0.0  # monotonic
        self._highs = 0  # songs of the high lane in a row
        self._high_empty = -_EMPTY_SECONDS  # when the high lane was last seen to be empty (monotonic)

    async def open(self) -> None:
        """Subscribe to announcements of work. Raises `Unavailable`."""

        async def on_work(message: Msg) -> None:
            self._announced = True
            if message.data != b"normal":
                self._high_empty = -_EMPTY_SECONDS
            self._wake.set()

        with nats_errors("announcements of work cannot be subscribed to"):
            await self._nc.subscribe(work_subject(self._spec.role), cb=on_work)

    # --- looking and fetching

    async def wait(self) -> None:
        """Return when songs wait, or when draining. Raises `Unavailable` or `NotFound`."""
        while not self._draining.active:
            self._wake.clear()
            if self._announced:
                self._announced = False
                return
            busy = False
            for name in self._spec.consumers.values():
                with nats_errors("the queue cannot be looked at"):
                    info = await self._js.consumer_info(self._spec.stream, name)
                if info.num_pending:
                    return
                busy = busy or bool(info.num_ack_pending)
            # A message that a dead worker held does not count as pending; only fetching shows it.
            if busy and time.monotonic() - self._last_probe > self._ack_wait / 6:
                self._last_probe = time.monotonic()
                for name in self._spec.consumers.values():
                    if message := await self._fetch(name):
                        await message.give_back()
                        return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS):
                    await self._wake.wait()

    async def next(self, turn: Turn) -> JobContext | None:
        """Claim the next song that needs this stage under the turn's fencing token; None when none waits.

        Raises `Unavailable`.
        """
        self._announced = False
        while True:
            message = await self._look()
            if message is None:
                self._highs = 0
                return None
            if context := await self._claim(turn, message):
                return context

    async def _look(self) -> QueueMessage | None:
        """The next message. A high lane that was empty just now comes last: it is not looked at for each song."""
        empty = time.monotonic() < self._high_empty + _EMPTY_SECONDS
        order: tuple[Priority, Priority] = ("normal", "high") if empty else lanes(self._highs)
        for lane in (lane for lane in order if lane in self._spec.consumers):
            if lane == "high":
                self._high_empty = time.monotonic()  # unless work is announced while it is looked at
            if message := await self._fetch(self._spec.consumers[lane]):
                self._highs = self._highs + 1 if lane == "high" else 0
                if lane == "high":
                    self._high_empty = -_EMPTY_SECONDS
                return message
        return None

    async def _fetch(self, consumer: str) -> QueueMessage | None:
        """Fetch a message if there is one. A pull request that waits would stall across a reconnect."""
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._spec.stream}.{consumer}"
        request = b'{"batch":1,"no_wait":true}'
        with nats_errors("the queue cannot be read"):
            # Old style, with a subscription of its own: a message arrives under its own subject, not the reply's.
            answer = await self._nc.request(subject, request, timeout=_FETCH_SECONDS, old_style=True)
        headers = answer.headers or {}
        status = headers.get("Status")
        if status is None:
            return QueueMessage(answer)
        if status in ("404", "408"):
            return None
        raise Unavailable("nats", f"the queue answers {status} {headers.get('Description', '')}")

    # --- claiming

    async def _claim(self, turn: Turn, message: QueueMessage) -> JobContext | None:
        """Claim the song of a message; None when the message is settled because there is nothing to do."""
        try:
            order = read_order(message.subject, message.data, self._spec.order)
        except Unreadable as error:
            if error.newer:
                await _leave_to_newer(message, message.subject)
            else:
                name = message.subject.rpartition(".")[2]
                await self._settlement.dead_letter(message, name, f"not a job message: {error}")
            return None
        if self._in_hand(order.job_id):  # delivered twice; in a second it is clear what is left to do
            await message.give_back(delay=1)
            return None
        seen: Job | None = None

        def claim(job: Job) -> Job:
            nonlocal seen
            seen = job
            return self._claimed(job, turn, order, message)

        try:
            job = await self._jobs.update(order.job_id, order.tenant, claim)
        except NewerRecord as error:
            await _leave_to_newer(message, f"{order.job_id}: {error}")
            return None
        except Unavailable:
            with contextlib.suppress(Unavailable):
                await message.give_back(delay=2)
            raise
        except (JobStopped, JobConflict) as reason:  # ended, handed on, or its record expired
            log.info("%s: nothing to do, %s", order.job_id, reason)
            await self._settlement.finish(message, seen)
            return None
        except SongError as error:
            await self._settlement.fail(message, order.job_id, order.tenant, str(error))
            return None
        return JobContext(
            self._spec.role,
            message,
            order,
            job,
            turn,
            jobs=self._jobs,
            events=self._events,
            keep_every=self._ack_wait / 3,
            count_progress=self._count_progress,
        )

    def _claimed(self, job: Job, turn: Turn, order: TokenJob | DecodeJob, message: QueueMessage) -> Job:
        """A record as this turn claims it. Raises `JobStopped` when the stage is done, `SongError` after too many."""
        role = self._spec.role
        if (job.recording is not None) != (role == "encoder"):
            raise JobStopped(f"it is no work for the {role} worker")
        if job.status not in self._spec.accepts:
            raise JobStopped(f"the song is {job.status} already")
        if self._spec.refusal is not None:
            raise SongError(self._spec.refusal)
        attempts = 1 if job.status == "queued" else claim_of(job, role).attempts + 1
        if attempts > MAX_ATTEMPTS:
            raise SongError(f"its worker died {MAX_ATTEMPTS} times while working on it")
        claim: dict[str, Any] = {"fencing_token": turn.fencing_token, "attempts": attempts}
        changes: dict[str, Any] = {"started_at": job.started_at or time.time()}
        if isinstance(order, DecodeJob):
            claim["lane"] = decode_lane(message.subject)
            # Nothing is moved on by a message alone: its tokens may have been lost since, and be made again.
            if job.status == "decoding":  # its tokens are made; earlier versions of the codec claim by this
                changes["fencing_token"] = None
        else:
            changes["status"] = self._spec.status
        return with_claim(job, role, claim=claim, **changes)


async def _leave_to_newer(message: QueueMessage, what: str) -> None:
    log.warning("left for a newer worker: %s", what)
    await message.give_back(delay=60)
