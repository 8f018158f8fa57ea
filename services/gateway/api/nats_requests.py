"""What NATS clients ask for: songs to be made, on ``submit.<tenant>``, and records, on ``record.<tenant>.<job>``.

Clients are given no right to JetStream's own API, which sends its answers wherever a request says. `replies` keeps this
service from doing so.

The answer to a song is a superset of a PubAck, so that ``nats req``, ``nats pub --jetstream`` and every client
library's JetStream publish understand it. The header ``Nats-Msg-Id`` makes asking again harmless, as it does there.
Errors stand in the body, in JetStream's own form. Who may publish for which tenant is the NATS server's matter.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import msgspec
import nats
from nats.aio.client import Client
from nats.micro import add_service
from nats.micro.request import Request
from nats.micro.service import Service, ServiceConfig

from services.gateway.api.reply_subjects import Guarded, ReplySubjects
from services.gateway.auth.authenticate import Authenticator
from services.gateway.errors import ApiError, refusal, unknown_job
from services.gateway.submission.outage import PATIENCE
from services.gateway.submission.service import Submission
from shared.causes import why
from shared.jobs.store import JobStore
from shared.nats.connection import Connection
from shared.nats.subjects import TOK
from shared.schema.base import JOB_ID
from shared.schema.job import Job

log = logging.getLogger(__name__)

AT_ONCE = 32  # requests of a kind being answered at a time; more wait on the subscription
_QUEUE_FULL = 10077  # what JetStream says when a stream is full: clients know it
ERROR_CODES = {  # `err_code`; stable, in a range that the server does not use
    "invalid-request": 20001,
    "malformed-json": 20002,
    "too-large": 20003,
    "unavailable": 20004,
    "internal": 20005,
    "idempotency-mismatch": 20006,
    "conflict": 20007,
    "unauthorized": 20008,
    "too-many-requests": 20009,
    "unknown-job": 20010,
    "queue-full": _QUEUE_FULL,
}


class NatsRequests:
    """The micro-service. Gateways share the work by its queue group."""

    def __init__(
        self,
        nc: Connection,
        authenticator: Authenticator,
        submission: Submission,
        jobs: JobStore,
        replies: ReplySubjects,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._nc, self._up = cast("Client", Guarded(nc, replies)), nc.up
        self._authenticator, self._submission, self._jobs, self._spawn = authenticator, submission, jobs, spawn
        self._service: Service | None = None

    async def start(self) -> None:
        """Begin to take requests."""
        config = ServiceConfig(name="heartmula", version="0.1.0", description="Takes songs to be made")
        self._service = await add_service(self._nc, config)
        await self._service.add_endpoint(name="submit", subject="submit.*", handler=self._handler(self._take))
        await self._service.add_endpoint(name="record", subject="record.*.*", handler=self._handler(self._look_up))

    async def stop(self) -> None:
        """Take no more."""
        if self._service is not None:
            await self._service.stop()

    def _handler(self, answer: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[None]]:
        free = asyncio.Semaphore(AT_ONCE)

        async def respond(request: Request) -> None:
            try:
                body = await answer(request)
            except Exception as error:
                body = {"error": error_body(refusal(error))}
            try:
                if request._msg.reply:  # a plain publish asks for no answer
                    with contextlib.suppress(TimeoutError):  # a connection that was lost meanwhile
                        async with asyncio.timeout(PATIENCE):
                            await self._up.wait()
                    await request.respond(msgspec.json.encode(body))
            except nats.errors.Error as error:
                log.warning("a NATS client could not be answered: %s", why(error))
            finally:
                free.release()

        async def handle(request: Request) -> None:
            await free.acquire()  # handlers run one after the other: waiting here holds back the next
            self._spawn(respond(request))

        return handle

    async def _take(self, request: Request) -> dict[str, Any]:
        tenant, key = request.subject.split(".")[1], (request.headers or {}).get("Nats-Msg-Id")
        accepted = await self._submission.submit(self._authenticator.tenant(tenant), request.data, key)
        ack = {"stream": TOK, "seq": accepted.sequence, "duplicate": accepted.duplicate}
        return ack | {name: value for name, value in msgspec.structs.asdict(accepted.body).items() if value is not None}

    async def _look_up(self, request: Request) -> Job:
        _, name, job_id = request.subject.split(".")
        tenant = self._authenticator.tenant(name).tenant
        job = await self._jobs.get(job_id, tenant) if JOB_ID.fullmatch(job_id) else None
        if job is None:
            raise unknown_job()
        return job


def error_body(found: ApiError) -> dict[str, Any]:
    """A refusal as JetStream would say it: these three members and no more, or client libraries stumble."""
    code = ERROR_CODES.get(found.kind, ERROR_CODES["internal"])
    return {"code": found.status, "err_code": code, "description": found.detail}
