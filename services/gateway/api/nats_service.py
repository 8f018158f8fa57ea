"""A service of NATS whose endpoints answer several requests at a time, and whose statistics are those of the answers.

nats-py's own framework takes one request after the other, and counts its time until the handler returns: this one
returns at once, so its statistics are counted here.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from nats.aio.client import Client
from nats.micro.request import ERROR_CODE_HEADER, ERROR_HEADER, Request
from nats.micro.service import Service, ServiceConfig, ServiceStats

from services.gateway.api.nats_bodies import ErrorBody, RefusedBody
from services.gateway.api.reply_subjects import FilteredConnection, ReplySubjects
from services.gateway.errors import to_api_error
from services.gateway.submission.outage import PATIENCE
from shared.errors import Unavailable
from shared.nats.connection import Connection
from shared.nats.errors import nats_errors

log = logging.getLogger(__name__)

AT_ONCE = 32  # requests of a kind that are answered at a time; others wait on the subscription


@dataclass(frozen=True)
class Endpoint:
    """A subject on which requests are answered."""

    name: str
    subject: str
    answer: Callable[[Request], Awaitable[Any]]  # returns the body; what it raises is answered as an error
    metadata: Mapping[str, str]  # as `nats micro info` shows it


@dataclass
class _Counts:
    """What an endpoint has answered since it was started."""

    requests: int = 0
    errors: int = 0
    nanoseconds: int = 0
    last_error: str | None = None


class NatsService:
    """Answers requests of NATS clients. Gateways share them by the service's queue group."""

    def __init__(
        self,
        nc: Connection,
        config: ServiceConfig,
        replies: ReplySubjects,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._up, self._spawn = nc.up, spawn
        self._service = _Service(cast("Client", FilteredConnection(nc, replies)), config)

    async def start(self, endpoints: list[Endpoint]) -> None:
        """Begin to answer. Raises `Unavailable`."""
        with nats_errors("requests of NATS clients cannot be taken"):
            await self._service.start()
            for endpoint in endpoints:
                counts = self._service.counts.setdefault(endpoint.name, _Counts())
                await self._service.add_endpoint(
                    name=endpoint.name,
                    subject=endpoint.subject,
                    handler=self._handler(endpoint, counts),
                    metadata=dict(endpoint.metadata),
                )

    async def stop(self) -> None:
        """Take no more requests. Raises `Unavailable`."""
        with nats_errors("requests of NATS clients are still taken"):
            await self._service.stop()

    def _handler(self, endpoint: Endpoint, counts: _Counts) -> Callable[[Request], Awaitable[None]]:
        free = asyncio.Semaphore(AT_ONCE)

        async def respond(request: Request) -> None:
            try:
                body, headers = await self._answer(endpoint, counts, request)
                if request._msg.reply:  # a plain publish asks for no answer
                    with contextlib.suppress(TimeoutError):  # the connection was lost meanwhile, and is not back
                        async with asyncio.timeout(PATIENCE):
                            await self._up.wait()
                    with nats_errors("a NATS client could not be answered"):
                        await request.respond(msgspec.json.encode(body), headers)
            except Unavailable as error:
                log.warning("%s", error)
            finally:
                free.release()

        async def handle(request: Request) -> None:
            await free.acquire()  # handlers run one after the other: waiting here holds back the next
            self._spawn(respond(request))

        return handle

    async def _answer(self, endpoint: Endpoint, counts: _Counts, request: Request) -> tuple[Any, dict[str, str] | None]:
        """The body of an answer, and headers that say whether it is an error."""
        began = time.perf_counter_ns()
        try:
            return await endpoint.answer(request), None
        except Exception as error:
            found = to_api_error(error)
            counts.errors += 1
            counts.last_error = f"{found.status}: {found.detail}"
            words = " ".join(found.detail.encode("ascii", "replace").decode().split())
            headers = {ERROR_CODE_HEADER: str(found.status), ERROR_HEADER: words}
            return RefusedBody(error=ErrorBody.of(found)), headers
        finally:
            counts.requests += 1
            counts.nanoseconds += time.perf_counter_ns() - began


class _Service(Service):
    """nats-py's service with other statistics."""

    def __init__(self, client: Client, config: ServiceConfig) -> None:
        super().__init__(client, config)
        self.counts: dict[str, _Counts] = {}  # by endpoint

    def stats(self) -> ServiceStats:
        found = super().stats()
        for endpoint in found.endpoints:
            counts = self.counts[endpoint.name]
            endpoint.num_requests, endpoint.num_errors = counts.requests, counts.errors
            endpoint.last_error = counts.last_error
            endpoint.processing_time = counts.nanoseconds
            endpoint.average_processing_time = counts.nanoseconds // max(1, counts.requests)
        return found
