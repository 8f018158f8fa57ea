"""Taking a song: validate, record, publish. The same for HTTP and for NATS clients."""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import msgspec
import nats
from msgspec import Meta
from nats.aio.client import Client
from nats.js.errors import APIError, NotFoundError

from services.gateway.auth.api_keys import Caller
from services.gateway.auth.quota import Quotas
from services.gateway.background.webhooks.consumer import Webhooks
from services.gateway.errors import refusal
from services.gateway.monitoring.health import Health
from services.gateway.monitoring.metrics import Metrics
from services.gateway.songs.eta import EtaEstimator, Expectation
from services.gateway.submission.idempotency import digest_of, removed, require_same, songs_of
from services.gateway.submission.outage import Outage, Patience
from services.gateway.submission.rollback import retract, retract_in_time
from services.gateway.submission.validation import Fitter, decode_request
from shared.causes import NO_ANSWER, why
from shared.errors import JobConflict, QueueFull, Unavailable
from shared.jobs.events import EventPublisher
from shared.jobs.queues import queue_group, queue_tokens
from shared.jobs.store import JobStore
from shared.nats.subjects import TOK, token_subject
from shared.schema.event import Queued
from shared.schema.job import Job, Status
from shared.schema.request import MAX_SEED, GenerateRequest
from shared.tracing import span

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
    variants: Annotated[list["AcceptedBody"], Meta(description="all songs, where several were asked for")] | None = None


@dataclass(frozen=True)
class Accepted:
    """A song that is in the queue, on disk, or was when it was asked for before."""

    job: Job
    sequence: int  # of its message in the queue; 0 when it is no longer there
    expected: Expectation
    duplicate: bool = False  # the same was asked for before, under the same key
    variants: "tuple[Accepted, ...]" = ()  # all songs, this one first, where several were asked for

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
            variants=[variant.body for variant in self.variants] or None,
        )


@dataclass
class _Order:
    """A request for songs, and what was done about it so far."""

    caller: Caller
    asked: GenerateRequest
    ids: list[str]
    digest: str | None = None
    fitted: GenerateRequest | None = None  # with what was left to us filled in
    admitted: int = 0  # songs that were counted against the caller's limits
    mine: dict[str, Job] = field(default_factory=dict)  # songs whose records this request made, or may have made


class Submission:
    """Takes songs."""

    def __init__(
        self,
        nc: Client,
        quotas: Quotas,
        fitter: Fitter,
        webhooks: Webhooks,
        health: Health,
        outage: Outage,
        eta: EtaEstimator,
        metrics: Metrics,
        spawn: Callable[[Coroutine[Any, Any, None]], object],  # runs what an answer need not wait for
    ) -> None:
        self._nc, self._js = nc, nc.jetstream(timeout=5)
        self._quotas, self._webhooks = quotas, webhooks
        self.fitter, self._health, self._spawn = fitter, health, spawn
        self._outage, self._eta, self._metrics = outage, eta, metrics
        self._jobs, self._events = JobStore(self._js), EventPublisher(self._js)

    async def submit(self, caller: Caller, data: bytes, key: str | None = None) -> Accepted:
        """Take a song, a JSON object, or several variants of it. Returns once JetStream has all of them on disk.

        A request that comes again under the same key is answered with the song that it made the first time. While a
        server is away for a short time the request waits. Raises `ApiError`; then nothing stays behind.
        """
        patience = self._outage.patience()
        try:
            async with self._quotas.lock(caller):
                with span("submit"):
                    return await self._submit(caller, data, key, patience)
        except Exception as error:
            found = refusal(error, self._outage.retry_after(error))
            self._metrics.refused.labels(found.kind).inc()
            if found is error:
                raise
            raise found from error

    async def _submit(self, caller: Caller, data: bytes, key: str | None, patience: Patience) -> Accepted:
        asked = decode_request(data)
        self._webhooks.check(asked.webhook_url)
        if key is None:
            order = _Order(caller, asked, [str(uuid.uuid4()) for _ in range(asked.variants)])
        else:
            order = _Order(caller, asked, songs_of(key, asked.variants, caller.tenant), digest_of(asked))
        try:
            accepted = await self._insist(order, patience)
            self._quotas.give_back(caller, order.admitted - len(order.mine))
            return accepted
        except QueueFull:
            self._quotas.give_back(caller, order.admitted)
            for job in order.mine.values():
                with contextlib.suppress(Unavailable, nats.errors.Error, APIError, TimeoutError, OSError):
                    await retract(self._js, job)
            raise
        except BaseException:
            self._quotas.give_back(caller, order.admitted)
            for job in order.mine.values():
                self._spawn(retract_in_time(self._js, job))
            raise

    async def _insist(self, order: "_Order", patience: Patience) -> Accepted:
        """Take the songs, again after a conflict or while a server is away: what was done before is found again."""
        conflicts = 0
        while True:
            try:
                try:
                    async with patience.attempt():
                        return await self._take(order)
                except TimeoutError:
                    raise Unavailable("nats", f"NATS does not answer: {NO_ANSWER}") from None
            except JobConflict:  # the same request, being taken or taken back at this moment
                conflicts += 1
                if conflicts == _TRIES:
                    raise Unavailable("nats", "the song's record keeps changing; try again") from None
            except Unavailable as error:
                await patience.wait(error)

    async def _take(self, order: "_Order") -> Accepted:
        """Take the songs of a request, all of them: those that have no record are made.

        Raises `JobConflict` when a record came or went meanwhile.
        """
        mine = order.mine
        known = [await self._known(order, job_id) for job_id in order.ids]
        jobs = await self._record(order, known)
        # The message of a record that was found may be missing: whoever made it may have died before, or is at it.
        sequences = [await self._find(job) if found else 0 for job, found in zip(jobs, known, strict=True)]
        await self._enqueue(jobs, sequences)
        for index, job in enumerate(jobs):
            if job.job_id not in mine and job.status == "queued":
                jobs[index] = await self._jobs.update(job.job_id, job.tenant, _once_more)
        taken = [await self._accepted(job, seq, mine) for job, seq in zip(jobs, sequences, strict=True)]
        return replace(taken[0], duplicate=not mine, variants=tuple(taken) if len(taken) > 1 else ())

    async def _known(self, order: "_Order", job_id: str) -> Job | None:
        """The record of a song that is there already: another request's, or our own, whose writing was not answered."""
        written = order.mine.get(job_id)
        if written is None and order.digest is None:
            return None  # no other request knows the id
        job = await self._jobs.get(job_id, order.caller.tenant)
        if job is not None and written is not None and not _same(job, written):
            del order.mine[job_id]  # another request was quicker
        return job

    async def _record(self, order: "_Order", known: list[Job | None]) -> list[Job]:
        """The records of all variants; those that are not known are made, with seeds that go with the others'."""
        caller, digest, mine = order.caller, order.digest, order.mine
        for job in known:
            if job is not None and digest is not None:
                require_same(job, digest)
        if None not in known:
            return [job for job in known if job is not None]
        found = next(((index, job.request) for index, job in enumerate(known) if job is not None), None)
        self._quotas.check(caller, order.asked)
        if (more := known.count(None) - order.admitted) > 0:
            self._quotas.check_rate(caller, more)
        if found is None and order.fitted is None:
            order.fitted = await self.fitter.fit(order.asked, caller.limits.max_duration_ms)
        place, request = found or (0, order.fitted)
        assert request is not None
        await self._health.require_servers()
        if more > 0:
            await self._quotas.take(caller, more)
            order.admitted += more
        jobs = []
        for index, job_id in enumerate(order.ids):
            job = known[index]
            if job is None:
                seed = ((request.seed or 0) + index - place) % (MAX_SEED + 1)
                job = mine.get(job_id) or Job(
                    job_id=job_id,
                    tenant=caller.tenant,
                    request=msgspec.structs.replace(request, seed=seed, variants=1),
                    tags_sent=order.asked.tags if order.asked.tags != request.tags else None,
                    created_at=time.time(),
                    group=order.ids[0] if len(order.ids) > 1 else None,
                    variant=index + 1 if len(order.ids) > 1 else None,
                    digest=digest,
                )
                mine[job_id] = job
                try:
                    await self._jobs.create(job)
                except JobConflict:  # another request's, or our own after all: the next look tells
                    if await self._jobs.was_deleted(job_id, caller.tenant):
                        del mine[job_id]
                        raise removed() from None
                    raise
            jobs.append(job)
        return jobs

    async def _enqueue(self, jobs: list[Job], sequences: list[int]) -> None:
        """Queue the songs that wait and have no message, all or none of them; their sequences are filled in."""
        missing = [index for index, job in enumerate(jobs) if job.status == "queued" and not sequences[index]]
        if len(missing) == 1:
            ack = await queue_tokens(self._nc, jobs[missing[0]])
            added = [ack.seq] if ack else None
        else:
            added = await queue_group(self._nc, [jobs[index] for index in missing]) if missing else []
        if added is None:
            raise JobConflict("a duplicate of the request was quicker")
        for index, sequence in zip(missing, added, strict=True):
            sequences[index] = sequence

    async def _accepted(self, job: Job, sequence: int, mine: dict[str, Job]) -> Accepted:
        expected = await self._eta.estimate_accepted(job, sequence)
        if job.job_id in mine:
            self._metrics.accepted.inc()
            log.info("%s: taken, %d ms", job.job_id, job.request.max_duration_ms or 0)
            event = Queued(
                job_id=job.job_id, status="queued", progress=0, queue_position=expected.position, eta=expected.eta
            )
            if job.status == "queued":  # an event that comes after others would be misunderstood
                self._spawn(self._events.publish(job.tenant, event))
        return Accepted(job, sequence, expected)

    async def _find(self, job: Job) -> int:
        """The sequence of a song's message in the queue, or 0."""
        try:
            return (await self._js.get_msg(TOK, subject=token_subject(job.request.priority, job.job_id))).seq or 0
        except NotFoundError:
            return 0
        except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
            raise Unavailable("nats", f"NATS does not answer: {why(error)}") from error


def _same(one: Job, other: Job) -> bool:
    """Whether two records are of the same making, whatever happened to the song since."""
    return (one.created_at, one.request) == (other.created_at, other.request)


def _once_more(job: Job) -> Job:
    """A copy, so that the record is written: see `retraction`."""
    return msgspec.structs.replace(job) if job.status == "queued" else job
