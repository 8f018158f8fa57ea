"""Taking a song: validate, record, publish. The same for HTTP and for NATS clients."""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
import nats
from nats.aio.client import Client
from nats.js.errors import APIError, NotFoundError

from services.gateway.access import Caller
from services.gateway.health import Health
from services.gateway.idempotency import digest_of, require_same, song_of
from services.gateway.metrics import Metrics
from services.gateway.outlook import Expectation, Outlook
from services.gateway.problems import refusal
from services.gateway.retraction import retract, retract_in_time
from services.gateway.validation import Fitter, decode_request
from shared.errors import JobConflict, QueueFull, Unavailable
from shared.events import EventPublisher
from shared.jobs import JobStore
from shared.messages import GenerateRequest, Job, Queued, Status
from shared.queues import queue_tokens
from shared.topology import TOK, token_subject

log = logging.getLogger(__name__)

_TRIES = 10


class AcceptedBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to a song that was taken."""

    job_id: str
    status: Status
    status_url: str
    result_url: str
    events_url: str
    queue_position: int | None = None  # songs before it
    eta: str | None = None  # when it is expected to be completed, RFC 3339


@dataclass(frozen=True)
class Accepted:
    """A song that is in the queue, on disk, or was when it was asked for before."""

    job: Job
    sequence: int  # of its message in the queue; 0 when it is no longer there
    expected: Expectation
    duplicate: bool = False  # the same was asked for before, under the same key

    @property
    def body(self) -> AcceptedBody:
        """What a client is told."""
        base = f"/generate/{self.job.job_id}"
        return AcceptedBody(
            job_id=self.job.job_id,
            status=self.job.status,
            status_url=f"{base}/status",
            result_url=f"{base}/result",
            events_url=f"{base}/events",
            queue_position=self.expected.position,
            eta=self.expected.eta,
        )


class Submission:
    """Takes songs."""

    def __init__(
        self,
        nc: Client,
        fitter: Fitter,
        health: Health,
        outlook: Outlook,
        metrics: Metrics,
        spawn: Callable[[Coroutine[Any, Any, None]], object],  # runs what an answer need not wait for
    ) -> None:
        self._nc, self._js = nc, nc.jetstream(timeout=5)
        self._fitter, self._health, self._spawn = fitter, health, spawn
        self._outlook, self._metrics = outlook, metrics
        self._jobs, self._events = JobStore(self._js), EventPublisher(self._js)

    async def submit(self, caller: Caller, data: bytes, key: str | None = None) -> Accepted:
        """Take a song, a JSON object. Returns once JetStream has it on disk.

        A request that comes again under the same key is answered with the song that it made the first time.
        Raises `Refusal`; then nothing stays behind.
        """
        try:
            accepted = await self._submit(caller, data, key)
        except Exception as error:
            found = refusal(error)
            self._metrics.refused.labels(found.kind).inc()
            if found is error:
                raise
            raise found from error
        if not accepted.duplicate:
            self._metrics.accepted.inc()
        return accepted

    async def _submit(self, caller: Caller, data: bytes, key: str | None) -> Accepted:
        asked = decode_request(data)
        if key is None:
            return await self._take(caller, str(uuid.uuid4()), asked, None)
        job_id, digest = song_of(key, caller.tenant), digest_of(asked)
        for _ in range(_TRIES):
            job = await self._jobs.get(job_id, caller.tenant)
            try:
                if job is None:
                    return await self._take(caller, job_id, asked, digest)
                require_same(job, digest)
                return await self._repeat(job)
            except JobConflict:  # the same request, being taken or taken back at this moment
                continue
        raise Unavailable("nats", "the song's record keeps changing; try again")

    async def _take(self, caller: Caller, job_id: str, asked: GenerateRequest, digest: str | None) -> Accepted:
        """Make a new song. Raises `JobConflict` when its id is taken."""
        request = await self._fitter.fit(asked)
        await self._health.require_store()
        job = Job(job_id=job_id, tenant=caller.tenant, request=request, created_at=time.time(), digest=digest)
        await self._record(job)
        sequence = await self._enqueue_new(job)
        log.info("%s: taken, %d ms", job.job_id, request.max_duration_ms or 0)
        expected = await self._outlook.of_accepted(job, sequence)
        event = Queued(
            job_id=job.job_id, status="queued", progress=0, queue_position=expected.position, eta=expected.eta
        )
        await self._events.publish(job.tenant, event)
        return Accepted(job, sequence, expected)

    async def _repeat(self, job: Job) -> Accepted:
        """Answer with a song that has a record. Raises `JobConflict` when it is taken back meanwhile."""
        sequence = await self._find(job)
        if job.status == "queued":
            # Whoever made the record may have died before the message; if it lives, one of the two is refused.
            sequence = sequence or await self._enqueue(job)
            job = await self._jobs.update(job.job_id, job.tenant, _once_more)
        return Accepted(job, sequence, await self._outlook.of_accepted(job, sequence), duplicate=True)

    async def _record(self, job: Job) -> None:
        try:
            await self._jobs.create(job)
        except JobConflict:
            raise
        except BaseException:  # it may have been written all the same
            self._spawn(retract_in_time(self._js, job))
            raise

    async def _enqueue_new(self, job: Job) -> int:
        try:
            return await self._enqueue(job)
        except QueueFull:
            with contextlib.suppress(Unavailable, nats.errors.Error, APIError, TimeoutError, OSError):
                await retract(self._js, job)
            raise
        except BaseException:
            self._spawn(retract_in_time(self._js, job))
            raise

    async def _enqueue(self, job: Job) -> int:
        """Publish a song's message; returns its sequence, or 0 where it was there and is gone."""
        ack = await queue_tokens(self._nc, job)
        return ack.seq if ack else await self._find(job)  # else a duplicate of the request was quicker

    async def _find(self, job: Job) -> int:
        """The sequence of a song's message in the queue, or 0."""
        try:
            return (await self._js.get_msg(TOK, subject=token_subject(job.request.priority, job.job_id))).seq or 0
        except NotFoundError:
            return 0
        except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
            raise Unavailable("nats", f"NATS does not answer: {str(error) or type(error).__name__}") from error


def _once_more(job: Job) -> Job:
    """A copy, so that the record is written: see `retraction`."""
    return msgspec.structs.replace(job) if job.status == "queued" else job
