"""A song's events as server-sent events: what the websocket tells, for clients that know HTTP alone."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any, cast

from litestar import Request, get
from litestar.di import NamedDependency
from litestar.openapi.spec import OpenAPIType, Schema
from litestar.params import FromPath
from litestar.types import ASGIApp, Receive, Scope, Send

from services.gateway.api.docs.openapi import Answer, operation, parameter, refusals
from services.gateway.api.guards import OWN_PAGES
from services.gateway.auth.api_keys import Caller
from services.gateway.container import Gateway
from services.gateway.errors import ApiError
from services.gateway.events.store import Frame, last_sequence
from services.gateway.songs.event_feed import EventFeed, Lost, event_id
from services.gateway.songs.status import find_job
from shared.errors import HeartMulaError
from shared.nats.subjects import event_subject
from shared.schema.job import ENDED

log = logging.getLogger(__name__)

SEND_SECONDS = 10.0  # that a client may let its stream stand
PING_SECONDS = 15.0  # proxies cut what is silent for a minute
RETRY_MS = 2000  # after which a browser comes again
_SEQUENCE = Schema(type=OpenAPIType.STRING, pattern="^[0-9]{0,18}$")
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would hold events back
}


class _Gone(Exception):
    """Nobody is there any more."""


@get(
    "/generate/{job_id:str}/events",
    opt=OWN_PAGES,
    operation_class=operation(
        parameter("after", "query", "id of the latest event that is known: those after it are told first", _SEQUENCE),
        parameter("Last-Event-ID", "header", "the same, as browsers send it when they come again", _SEQUENCE),
        answers={
            200: Answer(
                "`id`, `event` and `data` (JSON) of a snapshot, then of every event until the song has ended",
                content={"text/event-stream": Schema()},
            ),
            204: Answer("the song has ended, and the event of Last-Event-ID was the latest"),
        },
    ),
    responses=refusals(404, 422, 503),
)
async def event_stream(
    request: Request[Any, Any, Any],
    gateway: NamedDependency[Gateway],
    caller: NamedDependency[Caller],
    job_id: FromPath[str],
) -> ASGIApp:
    """Follow a song until it has ended, with server-sent events. A websocket at this address tells the same."""
    again = _sequence("Last-Event-ID", request.headers.get("last-event-id"))
    after = _sequence("after", request.query_params.get("after"))
    job = await find_job(gateway, caller.tenant, job_id)
    if again is not None and job.status in ENDED:
        last = await last_sequence(gateway.js, event_subject(job.tenant, job.job_id, "*"))
        if last <= again:  # else a browser would come again for ever
            return cast("ASGIApp", _Nothing())
    return cast("ASGIApp", _EventStream(gateway, caller.tenant, job_id, again if again is not None else after))


def _sequence(name: str, text: str | None) -> int | None:
    if not text:
        return None
    try:
        return event_id(text)
    except ValueError:
        raise ApiError(422, "invalid-request", f"{name} must be the id of an event", field=name) from None


class _Nothing:
    """204, which tells a browser to stay away."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": [(b"cache-control", b"no-store")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass
class _EventStream:
    """An ASGI response. It begins with the first frame: what goes wrong before is answered as everywhere."""

    gateway: Gateway
    tenant: str
    job_id: str
    after: int | None
    begun: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: HeartMulaError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                beside = [group.create_task(_until_gone(receive)), group.create_task(self._ping(send))]
                refused = await self._follow(send)
                for task in beside:
                    task.cancel()
        except* _Gone:
            refused = None
        if refused is not None:
            raise refused

    async def _follow(self, send: Send) -> HeartMulaError | None:
        async def deliver(frame: Frame) -> None:
            text = f"id: {frame.id}\nevent: {frame.type}\ndata: {frame.data}\n\n"  # JSON has no line breaks
            async with asyncio.timeout(SEND_SECONDS):
                await self._begin(send)
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        try:
            await EventFeed(self.gateway, self.tenant, self.job_id, deliver).run(self.after)
        except Lost:
            pass  # the stream ends without the song's end: the client comes again and is told the rest
        except HeartMulaError as error:
            if not self.begun:
                return error
            log.warning("%s: events cannot be followed: %s", self.job_id, error)
        except (OSError, TimeoutError) as error:  # who does not read cannot be told anything
            raise _Gone from error
        if self.begun:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None

    async def _begin(self, send: Send) -> None:
        if self.begun:
            return
        self.begun = True
        headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": f"retry: {RETRY_MS}\n\n".encode(), "more_body": True})

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    if self.begun:
                        await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
            except (OSError, TimeoutError) as error:
                raise _Gone from error


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise _Gone
