"""Songs asked for by NATS clients: a request on ``submit.<tenant>``, answered like a JetStream publish.

The answer is a superset of a PubAck, so that ``nats req``, ``nats pub --jetstream`` and every client library's
JetStream publish understand it. The header ``Nats-Msg-Id`` makes asking again harmless, as it does there. Errors stand
in the body, in JetStream's own form. Who may publish for which tenant is the NATS server's matter.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import nats
from nats.micro import add_service
from nats.micro.request import Request
from nats.micro.service import Service, ServiceConfig

from services.gateway.access import Access
from services.gateway.outage import PATIENCE
from services.gateway.problems import Refusal, refusal
from services.gateway.submission import Submission
from shared.causes import why
from shared.connection import Connection
from shared.topology import TOK, submit_subject

log = logging.getLogger(__name__)

AT_ONCE = 32  # songs being taken at a time; more wait on the subscription
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
    "queue-full": _QUEUE_FULL,
}


class Intake:
    """The micro-service. Gateways share the work by its queue group."""

    def __init__(
        self,
        nc: Connection,
        access: Access,
        submission: Submission,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._nc, self._access, self._submission, self._spawn = nc, access, submission, spawn
        self._free = asyncio.Semaphore(AT_ONCE)
        self._service: Service | None = None

    async def start(self) -> None:
        """Begin to take songs."""
        config = ServiceConfig(name="heartmula", version="0.1.0", description="Takes songs to be made")
        self._service = await add_service(self._nc, config)
        await self._service.add_endpoint(name="submit", subject=submit_subject("*"), handler=self._handle)

    async def stop(self) -> None:
        """Take no more."""
        if self._service is not None:
            await self._service.stop()

    async def _handle(self, request: Request) -> None:
        await self._free.acquire()  # handlers run one after the other: waiting here holds back the next
        self._spawn(self._answer(request))

    async def _answer(self, request: Request) -> None:
        try:
            body = await self._take(
                request.subject.rpartition(".")[2], request.data, (request.headers or {}).get("Nats-Msg-Id")
            )
            if request._msg.reply:  # a plain publish has nobody to answer
                with contextlib.suppress(TimeoutError):  # a connection that was lost meanwhile
                    async with asyncio.timeout(PATIENCE):
                        await self._nc.up.wait()
                await request.respond(msgspec.json.encode(body))
        except nats.errors.Error as error:
            log.warning("a NATS client could not be answered: %s", why(error))
        finally:
            self._free.release()

    async def _take(self, tenant: str, data: bytes, key: str | None) -> dict[str, Any]:
        try:
            accepted = await self._submission.submit(self._access.tenant(tenant), data, key)
        except Exception as error:
            return {"error": error_body(refusal(error))}
        ack = {"stream": TOK, "seq": accepted.sequence, "duplicate": accepted.duplicate}
        return ack | {name: value for name, value in msgspec.structs.asdict(accepted.body).items() if value is not None}


def error_body(found: Refusal) -> dict[str, Any]:
    """A refusal as JetStream would say it: these three members and no more, or client libraries stumble."""
    code = ERROR_CODES.get(found.kind, ERROR_CODES["internal"])
    return {"code": found.status, "err_code": code, "description": found.detail}
