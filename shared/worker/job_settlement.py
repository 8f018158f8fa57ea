"""The ways in which a song leaves a worker: given back, sent back for new tokens, tried again later, or failed."""

import contextlib
import logging

from nats.aio.client import Client
from nats.js import JetStreamContext

from shared.errors import JobConflict, ObjectError, QueueFull, SongError, Unavailable
from shared.jobs.claims import claim_of, with_claim
from shared.jobs.events import EventPublisher, end_event
from shared.jobs.queues import queue_tokens, queue_windows
from shared.jobs.store import JobStore, change
from shared.nats.errors import nats_errors
from shared.nats.subjects import dead_subject, work_subject
from shared.schema.job import ENDED, Job
from shared.schema.worker import Role
from shared.storage.keys import song_prefixes
from shared.storage.objects import ObjectStore
from shared.worker.job_context import JobContext
from shared.worker.message import QueueMessage
from shared.worker.signals import JobStopped

log = logging.getLogger(__name__)

MAX_REMADE = 2  # times that the tokens of a song are made again
_REASON_LENGTH = 500  # characters of a dead letter's header


class JobSettlement:
    """Settles the messages of one role's queue. Methods raise `Unavailable` unless they say otherwise."""

    def __init__(
        self,
        nc: Client,
        js: JetStreamContext,
        role: Role,
        *,
        jobs: JobStore,
        events: EventPublisher,
        store: ObjectStore,
    ) -> None:
        self._nc, self._js, self._role = nc, js, role
        self._jobs, self._events, self._store = jobs, events, store

    async def give_back(self, context: JobContext, delay: float = 0, attempt_counts: bool = False) -> None:
        """Put a song back into the queue, to be delivered again after `delay` seconds. Raises nothing.

        Unless `attempt_counts`, the attempt is taken out of its record again.
        """

        now: Job | None = None

        def uncount(job: Job) -> Job:
            nonlocal now
            now = job
            if not context.holds(job):
                raise JobStopped("another worker has the song and its message")
            attempts = claim_of(job, self._role).attempts
            if attempt_counts or job.status in ENDED or not attempts:
                return job
            return with_claim(job, self._role, claim={"attempts": attempts - 1})

        job_id = context.job.job_id
        try:
            await self._jobs.update(job_id, context.job.tenant, uncount)
        except JobStopped as reason:
            log.info("%s: not given back, %s", job_id, reason)
            if now is not None:
                with contextlib.suppress(Unavailable):
                    await self.leave(context, now)
            return
        except (JobConflict, Unavailable) as error:
            log.warning("%s: given back, but its attempt counts: %s", job_id, error)
        with contextlib.suppress(Unavailable):
            await context.message.give_back(delay)
            with nats_errors("a song that was given back cannot be announced"):
                if not delay:
                    await self._nc.publish(work_subject(self._role))
                await self._nc.flush(1)
        log.info("%s: given back", job_id)

    async def leave(self, context: JobContext, job: Job) -> None:
        """Leave a song to the turn that has claimed it since, by its record.

        That turn may have the same message, which was delivered again: then the message stays. Where it has the song's
        message in the other lane, ours would only bring the song back here, and take it from that turn. But while ours
        was there, the song could not be queued in our lane, and that turn may be over: then it is queued now.
        """
        if not context.superseded(job):
            return
        await context.message.acknowledge()
        now = await self._jobs.get(job.job_id, job.tenant)
        if now is not None and now.status == "decoding":
            with contextlib.suppress(QueueFull):  # the reconciler finds a record without a message
                await queue_windows(self._nc, now)

    async def remake_tokens(self, context: JobContext, reason: str) -> None:
        """Put a song whose tokens are damaged or missing back into the queue for tokens.

        Raises `SongError` with the reason when that was tried too often, `JobStopped` when the song is not ours.
        """
        claimed = context.job

        def requeue(job: Job) -> Job:
            if job.status == "queued" and job.remade == claimed.remade + 1:  # written before, and the answer got lost
                return job
            if job.status != "decoding" or not context.holds(job):
                raise JobStopped(f"the song is {job.status} and no longer belongs to this worker")
            if job.remade >= MAX_REMADE:
                raise SongError(reason)
            # What was decoded stays: the tokens that are made again are the same, as a rule.
            return with_claim(
                job,
                self._role,
                claim={"fencing_token": None, "attempts": 0},
                status="queued",
                remade=job.remade + 1,
                attempts=0,
                tokens_key=None,
                frames=None,
            )

        log.warning("%s: its tokens are made again, %s", claimed.job_id, reason)
        job = await self._jobs.update(claimed.job_id, claimed.tenant, requeue)
        # Our message goes first: while it is there, the next decode job of this song would be taken for a repetition.
        # When we die in between, the reconciler finds a record without a message; likewise when the queue is full.
        await context.message.acknowledge()
        with contextlib.suppress(QueueFull):
            await queue_tokens(self._nc, job)

    async def retry_later(self, context: JobContext, failures: int, reason: str, delay: float) -> None:
        """Record an error as the song's `failures`-th, and try the song again after `delay` seconds."""

        def note(job: Job) -> Job:
            if job.status in ENDED or not context.holds(job):
                return job
            attempts = max(0, claim_of(job, self._role).attempts - 1)
            return with_claim(job, self._role, claim={"failures": failures, "attempts": attempts}, error=reason)

        await self._jobs.update(context.job.job_id, context.job.tenant, note)
        await context.message.give_back(delay)

    async def fail(self, message: QueueMessage, job_id: str, tenant: str, reason: str) -> None:
        """End a song as failed, with a reason in its record and its message as a dead letter."""

        def fail(job: Job) -> Job:
            return job if job.status in ENDED else change(job, status="failed", error=reason)

        log.error("%s: failed, %s", job_id, reason)
        job: Job | None = None
        with contextlib.suppress(JobConflict):
            job = await self._jobs.update(job_id, tenant, fail)
            await self._publish_end(job)
        await self.dead_letter(message, job_id, reason)
        if job is None or job.status != "failed":  # another worker has completed it meanwhile
            return
        if job.recording is not None:  # the same upload may be tried again; its audio goes with its record
            return
        with contextlib.suppress(Unavailable, ObjectError):
            for prefix in song_prefixes(job_id):
                await self._store.delete(prefix)

    async def finish(self, message: QueueMessage, job: Job | None) -> None:
        """Complete what a worker that died after its last write to the record may have left undone.

        `job` is the record, or None when there is none.
        """
        if job is not None and job.status in ENDED:
            await self._publish_end(job)
        elif job is not None and job.recording is None:
            with contextlib.suppress(QueueFull):  # the reconciler finds a record without a message
                if job.status == "queued":  # sent back for its tokens
                    await queue_tokens(self._nc, job)
                elif job.status == "decoding" and self._role == "tokenizer":  # handed on
                    await queue_windows(self._nc, job)
        await message.acknowledge()

    async def _publish_end(self, job: Job) -> None:
        """Publish that a song has ended. Of recordings there are no events."""
        if job.recording is None:
            await self._events.publish(job.tenant, end_event(job))

    async def dead_letter(self, message: QueueMessage, job_id: str, reason: str) -> None:
        """Store a message that no worker can use as a dead letter for the operator, and remove it from the queue."""
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in job_id) or "unknown"
        headers = {"Reason": " ".join(reason.split())[:_REASON_LENGTH]}
        with nats_errors("a dead letter cannot be stored"):
            await self._js.publish(dead_subject(self._role, name), message.data, headers=headers)
        await message.discard()
