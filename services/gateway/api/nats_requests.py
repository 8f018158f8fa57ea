"""The NATS service: accepts songs on ``submit.<tenant>``, and answers with records on ``record.<tenant>.<job>``.

Clients are given no right to JetStream's own API, which sends its answers wherever a request says. `reply_subjects`
keeps this service from doing so.

The answer to a request for a song is a superset of a PubAck, so that ``nats req``, ``nats pub --jetstream`` and every
client library's JetStream publish understand it. The header ``Nats-Msg-Id`` makes a repeated request harmless, as it
does there. Errors stand in the body, in JetStream's own form. The NATS server decides who may publish for which tenant.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import msgspec
from nats.aio.client import Client
from nats.micro import add_service
from nats.micro.request import Request
from nats.micro.service import Service, ServiceConfig

from services.gateway.api.reply_subjects import FilteredConnection, ReplySubjects
from services.gateway.auth.authenticate import Authenticator
from services.gateway.errors import ApiError, to_api_error, unknown_job
from services.gateway.submission.outage import PATIENCE
from services.gateway.submission.service import Submission
from shared.errors import Unavailable
from shared.jobs.store import JobStore
from shared.nats.connection import Connection
from shared.nats.errors import nats_errors
from shared.nats.subjects import TOK
from shared.schema.base import JOB_ID, VERSION
from shared.schema.job import Job

log = logging.getLogger(__name__)

AT_ONCE = 32  # requests of a kind that are answered at a time; others wait on the subscription
_QUEUE_FULL = 10077  # the code of JetStream for a full stream: clients know it
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
    "no-tokens": 20011,
    "unknown-recording": 20012,
    "not-ready": 20013,
    "queue-full": _QUEUE_FULL,
}


class NatsRequests:
    """Answers requests of NATS clients, as a service of NATS. Gateways share the work by its queue group."""

    def __init__(
        self,
        nc: Connection,
        authenticator: Authenticator,
        submission: Submission,
        jobs: JobStore,
        replies: ReplySubjects,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._nc, self._up = cast("Client", FilteredConnection(nc, replies)), nc.up
        self._authenticator, self._submission, self._jobs, self._spawn = authenticator, submission, jobs, spawn
        self._service: Service | None = None

    async def start(self) -> None:
        """Begin to accept requests. Raises `Unavailable`."""
        config = ServiceConfig(name="heartmula", version=VERSION, description="Takes songs to be made")
        with nats_errors("requests of NATS clients cannot be taken"):
            self._service = await add_service(self._nc, config)
            await self._service.add_endpoint(name="submit", subject="submit.*", handler=self._handler(self._submit))
            await self._service.add_endpoint(name="record", subject="record.*.*", handler=self._handler(self._look_up))

    async def stop(self) -> None:
        """Accept no more requests. Raises `Unavailable`."""
        if self._service is not None:
            with nats_errors("requests of NATS clients are still taken"):
                await self._service.stop()

    def _handler(self, answer: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[None]]:
        free = asyncio.Semaphore(AT_ONCE)

        async def respond(request: Request) -> None:
            try:
                body = await answer(request)
            except Exception as error:
                body = {"error": error_body(to_api_error(error))}
            try:
                if request._msg.reply:  # a plain publish asks for no answer
                    with contextlib.suppress(TimeoutError):  # the connection was lost meanwhile, and is not back
                        async with asyncio.timeout(PATIENCE):
                            await self._up.wait()
                    with nats_errors("a NATS client could not be answered"):
                        await request.respond(msgspec.json.encode(body))
            except Unavailable as error:
                log.warning("%s", error)
            finally:
                free.release()

        async def handle(request: Request) -> None:
            await free.acquire()  # handlers run one after the other: waiting here holds back the next
            self._spawn(respond(request))

        return handle

    async def _submit(self, request: Request) -> dict[str, Any]:
        tenant, key = request.subject.split(".")[1], (request.headers or {}).get("Nats-Msg-Id")
        accepted = await self._submission.submit(self._authenticator.tenant(tenant), request.data, key)
        ack = {"stream": TOK, "seq": accepted.sequence, "duplicate": accepted.duplicate}
        return ack | {name: value for name, value in msgspec.structs.asdict(accepted.body).items() if value is not None}

    async def _look_up(self, request: Request) -> Job:
        _, name, job_id = request.subject.split(".")
        tenant = self._authenticator.tenant(name).tenant
        job = await self._jobs.get(job_id, tenant) if JOB_ID.fullmatch(job_id) else None
        if job is None or job.recording is not None:
            raise unknown_job()
        return job


def error_body(found: ApiError) -> dict[str, Any]:
    """The error in JetStream's form: these three members and no more, since client libraries know no others."""
    code = ERROR_CODES.get(found.kind, ERROR_CODES["internal"])
    return {"code": found.status, "err_code": code, "description": found.detail}
