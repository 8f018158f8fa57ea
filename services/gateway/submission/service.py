"""Accepting songs, from HTTP and NATS clients alike."""

import contextlib
import logging
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import msgspec
from nats.aio.client import Client

from services.gateway.auth.api_keys import Caller
from services.gateway.auth.quota import Quotas
from services.gateway.background.deferred import DeferredSongs
from services.gateway.background.webhooks.consumer import Webhooks
from services.gateway.errors import to_api_error
from services.gateway.monitoring.health import Health
from services.gateway.monitoring.metrics import Metrics
from services.gateway.songs.eta import EtaEstimator
from services.gateway.submission.accepted import Accepted
from services.gateway.submission.continuing import Continuations
from services.gateway.submission.idempotency import digest_of, removed, require_same, songs_of
from services.gateway.submission.order import Order, is_deferred, new_record
from services.gateway.submission.outage import Outage, RequestWait
from services.gateway.submission.rollback import roll_back, roll_back_eventually
from services.gateway.submission.validation import ModelLimits, decode_request
from shared.causes import NO_ANSWER
from shared.errors import HeartMulaError, JobConflict, NotFound, QueueFull, Unavailable
from shared.jobs.events import EventPublisher
from shared.jobs.queues import queue_group, queue_tokens
from shared.jobs.store import JobStore
from shared.nats.errors import nats_errors
from shared.nats.subjects import TOK, token_subject
from shared.schema.base import timestamp
from shared.schema.event import Queued
from shared.schema.job import Job
from shared.schema.request import MAX_SEED
from shared.storage.objects import ObjectStore
from shared.tracing import span

log = logging.getLogger(__name__)

_CONFLICTS = 10  # in a row, after which a request is refused


class Submission:
    """Accepts songs in six steps.

    1. Validate the request: its JSON, its fields, the webhook's address, the key.
    2. Find the records that exist already, made by the same request under its key or by an earlier attempt.
    3. Check the quota and the servers, for songs without a record.
    4. Record those songs; what one takes over from another song is stored first.
    5. Publish: a message in the queue for each song that waits, all or none of them. A song that waits for its time
       is accepted with its record.
    6. Answer with place and ETA, and send the event.

    Steps 2 to 6 are repeated after a conflict and while a server is away for a short time; each finds what the attempt
    before has done. A request that is refused is rolled back.
    """

    def __init__(
        self,
        nc: Client,
        store: ObjectStore,
        quotas: Quotas,
        limits: ModelLimits,
        continuations: Continuations,
        webhooks: Webhooks,
        deferred: DeferredSongs,
        health: Health,
        outage: Outage,
        eta: EtaEstimator,
        metrics: Metrics,
        spawn: Callable[[Coroutine[Any, Any, None]], object],  # runs what an answer need not wait for
    ) -> None:
        self._nc, self._js = nc, nc.jetstream(timeout=5)
        self._store, self._continuations = store, continuations
        self._quotas, self._limits, self._webhooks, self._deferred = quotas, limits, webhooks, deferred
        self._health, self._outage, self._eta, self._metrics = health, outage, eta, metrics
        self._jobs, self._events, self._spawn = JobStore(self._js), EventPublisher(self._js), spawn

    async def submit(self, caller: Caller, data: bytes, key: str | None = None) -> Accepted:
        """Accept a song, a JSON object, or several variants of it. Returns once JetStream has all of them on disk.

        A request that comes again under the same key is answered with the song that it made the first time. While a
        server is away for a short time the request waits. Raises `ApiError`; then the request leaves nothing behind.
        """
        wait = self._outage.begin_request()
        try:
            async with self._quotas.lock(caller):
                with span("submit"):
                    return await self._submit(self._validate(caller, data, key), wait)
        except Exception as error:
            found = to_api_error(error, self._outage.retry_after(error))
            self._metrics.refused.labels(found.kind).inc()
            if found is error:
                raise
            raise found from error

    def _validate(self, caller: Caller, data: bytes, key: str | None) -> Order:
        """Step 1. Raises `InvalidRequest` or `ApiError`."""
        asked = decode_request(data)
        self._webhooks.check(asked)
        if key is None:
            return Order(caller, asked, [str(uuid.uuid4()) for _ in range(asked.variants)])
        return Order(caller, asked, songs_of(key, asked.variants, caller.tenant), digest_of(asked))

    async def _submit(self, order: Order, wait: RequestWait) -> Accepted:
        """Steps 2 to 6, and the rollback."""
        try:
            accepted = await self._accept_patiently(order, wait)
            self._quotas.give_back(order.caller, order.counted - len(order.created))
            return accepted
        except BaseException as error:
            self._quotas.give_back(order.caller, order.counted)
            left = list(order.created.values())
            if isinstance(error, QueueFull):  # NATS answers, so the records can be gone before the client is answered
                with contextlib.suppress(HeartMulaError):
                    while left:
                        await roll_back(self._js, self._store, left[-1])
                        left.pop()
            for job in left:
                self._spawn(roll_back_eventually(self._js, self._store, job))
            raise

    async def _accept_patiently(self, order: Order, wait: RequestWait) -> Accepted:
        """Accept the songs, trying again after a conflict or while a server is away."""
        conflicts = 0
        while True:
            try:
                try:
                    async with wait.attempt():
                        return await self._accept(order)
                except TimeoutError:
                    raise Unavailable("nats", f"NATS does not answer: {NO_ANSWER}") from None
            except JobConflict:  # the same request is being accepted or rolled back at this moment
                conflicts += 1
                if conflicts == _CONFLICTS:
                    raise Unavailable("nats", "the song's record keeps changing; try again") from None
            except Unavailable as error:
                await wait.until_back(error)

    async def _accept(self, order: Order) -> Accepted:
        """One attempt to accept all songs of a request. Raises `JobConflict` when a record came or went meanwhile."""
        known = [await self._find_record(order, job_id) for job_id in order.ids]
        if order.digest is not None:
            require_same([job for job in known if job is not None], order.digest)
        if None in known:
            await self._check_quota(order, known)
        jobs = await self._record(order, known)
        # The message of a record that was found may be missing: the process that made it may have died in between.
        sequences = [await self._find_message(job) if found else 0 for job, found in zip(jobs, known, strict=True)]
        await self._publish(jobs, sequences)
        for index, job in enumerate(jobs):
            if job.job_id not in order.created and job.status == "queued":
                jobs[index] = await self._jobs.update(job.job_id, job.tenant, _found_again)
        taken = [await self._answer(order, job, seq) for job, seq in zip(jobs, sequences, strict=True)]
        return replace(taken[0], duplicate=not order.created, variants=tuple(taken) if len(taken) > 1 else ())

    async def _find_record(self, order: Order, job_id: str) -> Job | None:
        """Step 2: the record of a song that exists already, another request's or one whose writing was not answered."""
        written = order.created.get(job_id)
        if written is None and order.digest is None:
            return None  # no other request knows the id
        job = await self._jobs.get(job_id, order.caller.tenant)
        if job and written and (job.created_at, job.request) != (written.created_at, written.request):
            del order.created[job_id]  # another request was quicker
        return job

    async def _check_quota(self, order: Order, known: list[Job | None]) -> None:
        """Step 3: count the songs without a record, fill in what was left open, and find what they go on from."""
        caller = order.caller
        self._quotas.check(caller, order.asked)
        if is_deferred(order.asked):
            await self._deferred.require_room(known.count(None))
        if (more := known.count(None) - order.counted) > 0:
            self._quotas.check_rate(caller, more)
        if order.continuation is None and order.asked.continue_from is not None:
            order.continuation = await self._continuations.open(caller.tenant, order.asked.continue_from)
        if order.completed is None and not any(known):
            kept = order.continuation.frames if order.continuation else 0
            order.completed = await self._limits.complete(order.asked, caller.limits.max_duration_ms, kept)
        await self._health.require_servers()
        if more > 0:
            await self._quotas.take(caller, more)
            order.counted += more

    async def _record(self, order: Order, known: list[Job | None]) -> list[Job]:
        """Step 4: the records of all variants. Missing ones are created, with seeds that follow from the others'."""
        found = next(((index, job.request) for index, job in enumerate(known) if job is not None), None)
        base, request = found or (0, order.completed)
        assert request is not None
        jobs = []
        for index, job_id in enumerate(order.ids):
            job = known[index]
            if job is None:
                seed = ((request.seed or 0) + index - base) % (MAX_SEED + 1)
                job = order.created.get(job_id) or new_record(order, index, request, seed)
                await self._create(order, job)
            jobs.append(job)
        return jobs

    async def _create(self, order: Order, job: Job) -> None:
        """Create the record of one song. Raises `JobConflict` where another request was quicker."""
        order.created[job.job_id] = job
        if order.continuation is not None:
            await self._continuations.store(job.job_id, order.continuation)
        try:
            await self._jobs.create(job)
        except JobConflict:  # another request's record, or this one's after all: the next attempt finds it
            if await self._jobs.was_deleted(job.job_id, job.tenant):
                raise removed() from None
            raise

    async def _find_message(self, job: Job) -> int:
        """The sequence of a song's message in the queue, or 0."""
        try:
            with nats_errors("NATS does not answer"):
                return (await self._js.get_msg(TOK, subject=token_subject(job.request.priority, job.job_id))).seq or 0
        except NotFound:
            return 0

    async def _publish(self, jobs: list[Job], sequences: list[int]) -> None:
        """Step 5: queue the songs that wait for no time and have no message, all or none; fills in their sequences."""
        waiting = [index for index, job in enumerate(jobs) if job.status == "queued" and not job.deferred]
        missing = [index for index in waiting if not sequences[index]]
        if len(missing) == 1:
            ack = await queue_tokens(self._nc, jobs[missing[0]])
            added = [ack.seq] if ack else None
        else:
            added = await queue_group(self._nc, [jobs[index] for index in missing]) if missing else []
        if added is None:
            raise JobConflict("a duplicate of the request was quicker")
        for index, sequence in zip(missing, added, strict=True):
            sequences[index] = sequence

    async def _answer(self, order: Order, job: Job, sequence: int) -> Accepted:
        """Step 6: what to expect of a song; its event is sent where this request created it."""
        expected = await self._eta.estimate_accepted(job, sequence)
        if job.job_id in order.created:
            self._metrics.accepted.inc()
            log.info("%s: accepted, %d ms", job.job_id, job.request.max_duration_ms or 0)
            if job.status == "queued":  # after the events of a later state this one would be wrong
                place, eta = expected.position, expected.eta
                until = timestamp(job.not_before) if job.deferred and job.not_before else None
                event = Queued(
                    job_id=job.job_id, status="queued", progress=0, not_before=until, queue_position=place, eta=eta
                )
                self._spawn(self._events.publish(job.tenant, event))
        return Accepted(job, sequence, expected)


def _found_again(job: Job) -> Job:
    """A copy of a waiting song's record, so that it is written again: a rollback then finds a newer record.

    It finds no message of a deferred song; so this one's record says that it is not to be removed.
    """
    return msgspec.structs.replace(job, repeated=job.deferred) if job.status == "queued" else job
