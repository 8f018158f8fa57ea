"""Requests of NATS clients: songs on ``submit.<tenant>`` and ``intake.<tenant>``, records on ``record.<tenant>.<job>``.

Clients are given no right to JetStream's own API, nor to publish to a stream: the server sends the answers wherever a
request says. `reply_subjects` keeps this service from doing so.

The answer to a request for a song is a superset of a PubAck, so that ``nats req``, ``nats pub --jetstream`` and every
client library's JetStream publish understand it. The header ``Nats-Msg-Id`` makes a repeated request harmless, as it
does there. Errors stand in the body, in JetStream's own form. The NATS server decides who may publish for which tenant.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from nats.micro.request import Request
from nats.micro.service import ServiceConfig

from services.gateway.api.nats_bodies import RefusedBody, StoredBody, TakenBody
from services.gateway.api.nats_service import Endpoint, NatsService
from services.gateway.api.reply_subjects import ReplySubjects
from services.gateway.auth.authenticate import Authenticator
from services.gateway.errors import unknown_job
from services.gateway.submission.intake import Intake
from services.gateway.submission.service import Submission
from shared.jobs.store import JobStore
from shared.nats.connection import Connection
from shared.nats.subjects import INTAKE, TOK
from shared.schema.base import JOB_ID, VERSION
from shared.schema.job import Job
from shared.schema.request import GenerateRequest

_CONFIG = ServiceConfig(
    name="heartmula", version=VERSION, description="Takes songs to be made, and shows their records"
)


class NatsRequests:
    """Answers requests of NATS clients."""

    def __init__(
        self,
        nc: Connection,
        authenticator: Authenticator,
        submission: Submission,
        intake: Intake,
        jobs: JobStore,
        replies: ReplySubjects,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._service = NatsService(nc, _CONFIG, replies, spawn)
        self._authenticator, self._submission, self._intake, self._jobs = authenticator, submission, intake, jobs

    async def start(self) -> None:
        """Begin to answer. Raises `Unavailable`."""
        submit = _schemas(request=GenerateRequest, response=TakenBody, error=RefusedBody)
        intake = _schemas(request=GenerateRequest, response=StoredBody, error=RefusedBody)
        record = _schemas(response=Job, error=RefusedBody)
        await self._service.start(
            [
                Endpoint("submit", "submit.*", self._submit, submit),
                Endpoint("intake", "intake.*", self._store, intake),
                Endpoint("record", "record.*.*", self._look_up, record),
            ]
        )

    async def stop(self) -> None:
        """Take no more requests. Raises `Unavailable`."""
        await self._service.stop()

    async def _submit(self, request: Request) -> dict[str, Any]:
        caller = self._authenticator.tenant(request.subject.split(".")[1])
        accepted = await self._submission.submit(caller, request.data, _key(request))
        ack = {"stream": TOK, "seq": accepted.sequence, "duplicate": accepted.duplicate}
        return ack | {name: value for name, value in msgspec.structs.asdict(accepted.body).items() if value is not None}

    async def _store(self, request: Request) -> StoredBody:
        stored = await self._intake.store(request.subject.split(".")[1], request.data, _key(request))
        return StoredBody(stream=INTAKE, seq=stored.sequence, duplicate=stored.duplicate, job_id=stored.job_id)

    async def _look_up(self, request: Request) -> Job:
        _, name, job_id = request.subject.split(".")
        tenant = self._authenticator.tenant(name).tenant
        job = await self._jobs.get(job_id, tenant) if JOB_ID.fullmatch(job_id) else None
        if job is None or job.recording is not None:
            raise unknown_job()
        return job


def _key(request: Request) -> str | None:
    return (request.headers or {}).get("Nats-Msg-Id")


def _schemas(**bodies: type[msgspec.Struct]) -> dict[str, str]:
    """JSON schemas of the bodies of an endpoint, as its metadata."""
    return {f"{name}_schema": msgspec.json.encode(msgspec.json.schema(body)).decode() for name, body in bodies.items()}
