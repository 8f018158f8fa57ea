"""The events of a song as server-sent events, for clients of plain HTTP: the same events as on the websocket."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import cast

from litestar import get
from litestar.di import NamedDependency
from litestar.openapi.spec import Schema
from litestar.params import FromPath
from litestar.types import ASGIApp, Receive, Scope, Send

from services.gateway.api.docs.openapi import Answer, operation, problems
from services.gateway.api.guards import OWN_PAGES
from services.gateway.api.parameters import After, LastEventId, known_event
from services.gateway.auth.api_keys import Caller
from services.gateway.events.stored_events import Frame
from services.gateway.songs.event_feed import EventFeeds, EventsLost
from services.gateway.songs.status import Songs
from shared.errors import HeartMulaError
from shared.schema.job import ENDED

log = logging.getLogger(__name__)

SEND_SECONDS = 10.0  # for which a client may leave its stream unread
PING_SECONDS = 15.0  # proxies close connections that are silent for a minute
RETRY_MS = 2000  # after which a browser connects again
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would hold events back
}


class _Gone(Exception):
    """The client has left."""


@get(
    "/generate/{job_id:str}/events",
    opt=OWN_PAGES,
    operation_class=operation(
        answers={
            200: Answer(
                "`id`, `event` and `data` (JSON) of a snapshot, then of every event until the song has ended",
                content={"text/event-stream": Schema()},
            ),
            204: Answer("the song has ended, and the event of Last-Event-ID was the latest"),
        },
    ),
    responses=problems(404, 422, 503),
)
async def event_stream(
    songs: NamedDependency[Songs],
    event_feeds: NamedDependency[EventFeeds],
    caller: NamedDependency[Caller],
    job_id: FromPath[str],
    after: After = None,
    last_event_id: LastEventId = None,
) -> ASGIApp:
    """Follow a song until it has ended, with server-sent events. A websocket at this address sends the same."""
    resumed, known = known_event("Last-Event-ID", last_event_id), known_event("after", after)
    job = await songs.find(caller.tenant, job_id)
    # Without this a browser would connect again and again.
    if resumed is not None and job.status in ENDED and await event_feeds.latest_id(job) <= resumed:
        return cast("ASGIApp", _NoContent())
    return cast("ASGIApp", _EventStream(event_feeds, caller.tenant, job_id, known if resumed is None else resumed))


class _NoContent:
    """Status 204, after which a browser does not connect again."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": [(b"cache-control", b"no-store")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass
class _EventStream:
    """An ASGI response. It begins with the first frame: an error before that is answered with a problem detail."""

    feeds: EventFeeds
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
            await self.feeds.follow(self.tenant, self.job_id, self.after, deliver)
        except EventsLost:
            pass  # the stream ends before the song does: the client connects again and is sent the rest
        except HeartMulaError as error:
            if not self.begun:
                return error
            log.warning("%s: events cannot be followed: %s", self.job_id, error)
        except (OSError, TimeoutError) as error:  # a client that does not read cannot be sent anything
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
