"""Taking a song: validate, record, publish. The same for HTTP and for NATS clients."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
import nats
from nats.js import JetStreamContext
from nats.js.api import PubAck
from nats.js.errors import APIError

from services.gateway.health import Health
from services.gateway.outlook import Expectation, Outlook
from services.gateway.validation import Fitter, decode_request
from shared.errors import QueueFull, Unavailable
from shared.events import EventPublisher
from shared.jobs import JobStore
from shared.messages import Job, Queued, Status, TokenJob
from shared.topology import TENANT, purge_job, token_subject

log = logging.getLogger(__name__)

_STREAM_FULL = 10077
_RETRACT_SECONDS = 300.0


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
    """A song that is in the queue, on disk."""

    job: Job
    ack: PubAck  # of the queue
    expected: Expectation

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
        js: JetStreamContext,
        fitter: Fitter,
        health: Health,
        outlook: Outlook,
        spawn: Callable[[Coroutine[Any, Any, None]], object],  # runs what an answer need not wait for
    ) -> None:
        self._js, self._fitter, self._health, self._outlook, self._spawn = js, fitter, health, outlook, spawn
        self._jobs, self._events = JobStore(js), EventPublisher(js)

    async def submit(self, data: bytes) -> Accepted:
        """Take a song, a JSON object. Returns once JetStream has it on disk.

        Raises `InvalidRequest`, `Refusal`, `QueueFull` or `Unavailable`; then nothing stays behind.
        """
        request = await self._fitter.fit(decode_request(data))
        await self._health.require_store()
        job = Job(job_id=str(uuid.uuid4()), tenant=TENANT, request=request, created_at=time.time())
        await self._record(job)
        ack = await self._enqueue(job)
        log.info("%s: taken, %d ms", job.job_id, request.max_duration_ms or 0)
        expected = await self._outlook.of_accepted(job, ack.seq)
        event = Queued(
            job_id=job.job_id, status="queued", progress=0, queue_position=expected.position, eta=expected.eta
        )
        await self._events.publish(TENANT, event)
        return Accepted(job, ack, expected)

    async def _record(self, job: Job) -> None:
        try:
            await self._jobs.create(job)
        except BaseException:  # it may have been written all the same
            self._spawn(self._retract(job))
            raise

    async def _enqueue(self, job: Job) -> PubAck:
        order = TokenJob(job_id=job.job_id, tenant=job.tenant)
        try:
            return await self._js.publish(
                token_subject(job.request.priority, job.job_id),
                msgspec.json.encode(order),
                headers={"Nats-Msg-Id": f"{job.job_id}:tok"},
            )
        except APIError as error:
            if error.err_code != _STREAM_FULL:
                self._spawn(self._retract(job))
                raise Unavailable("nats", f"NATS did not take the song: {error.description}") from error
            with contextlib.suppress(Unavailable):
                await self._jobs.delete(job)
            raise QueueFull("as many songs wait as may; try again in a while") from None
        except (nats.errors.Error, TimeoutError, OSError) as error:
            self._spawn(self._retract(job))
            raise Unavailable("nats", f"NATS does not answer: {str(error) or type(error).__name__}") from error
        except asyncio.CancelledError:
            self._spawn(self._retract(job))
            raise

    async def _retract(self, job: Job) -> None:
        """Nobody was told of this song, but a part of it may have arrived: take it back once NATS answers again."""
        deadline = time.monotonic() + _RETRACT_SECONDS
        while time.monotonic() < deadline:
            try:
                await purge_job(self._js, job.job_id)
                await self._jobs.delete(job)
                return
            except (Unavailable, nats.errors.Error, TimeoutError, OSError):
                await asyncio.sleep(1)
        log.warning("%s: may be made although it was refused; NATS did not answer", job.job_id)
