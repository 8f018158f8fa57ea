"""The events of a song over a websocket, and close codes that say why they end."""

import asyncio
import contextlib
import logging
from typing import Any, NamedTuple

from litestar import WebSocket, websocket
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect
from litestar.params import FromPath

from services.gateway.api.guards import CHECKS_ITSELF, PageRules, refuse_handshake
from services.gateway.api.parameters import After, known_event
from services.gateway.auth.authenticate import Authenticator
from services.gateway.errors import ApiError
from services.gateway.events.stored_events import Frame
from services.gateway.songs.event_feed import EventFeeds, EventsLost
from shared.errors import HeartMulaError

log = logging.getLogger(__name__)

Socket = WebSocket[Any, Any, Any]

DONE, REFUSED, FAULT, RECONNECT, UNAUTHORIZED, UNKNOWN = 1000, 1008, 1011, 1012, 4401, 4404
_SEND_ERRORS = (WebSocketDisconnect, OSError)


class _Close(NamedTuple):
    """The code with which a socket is closed, which says what the client has to do, and the reason."""

    code: int
    reason: str


class _Gone(Exception):
    """The client has left."""


@websocket("/generate/{job_id:str}/events", opt=CHECKS_ITSELF)
async def events(
    socket: Socket,
    authenticator: NamedDependency[Authenticator],
    event_feeds: NamedDependency[EventFeeds],
    rules: NamedDependency[PageRules],
    job_id: FromPath[str],
    after: After = None,
) -> None:
    """Follow a song until it has ended."""
    try:
        rules.check(socket, CHECKS_ITSELF)
    except ApiError as error:
        await refuse_handshake(error, socket.send)
        return
    await socket.accept()
    close: _Close | None = None
    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(_until_gone(socket))
            close = await _follow(socket, authenticator, event_feeds, job_id, after)
            watcher.cancel()
    except* _Gone:
        pass
    if close is not None:
        with contextlib.suppress(*_SEND_ERRORS):
            await socket.close(close.code, close.reason)


async def _until_gone(socket: Socket) -> None:
    """Raise once the client has left; what it sends is ignored."""
    with contextlib.suppress(WebSocketDisconnect):
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass
    raise _Gone


async def _follow(
    socket: Socket, authenticator: Authenticator, feeds: EventFeeds, job_id: str, after: str | None
) -> _Close:
    async def send(frame: Frame) -> None:
        await socket.send({"type": "websocket.send", "text": frame.data, "bytes": None})

    try:
        tenant = authenticator.caller(socket).tenant
        await feeds.follow(tenant, job_id, known_event("after", after), send)
    except EventsLost:
        return _Close(RECONNECT, "events were lost; connect again")
    except ApiError as error:
        if error.status == 422:
            return _Close(REFUSED, error.detail)
        if error.status == 401:  # a browser cannot tell a refused handshake from a server that is down
            return _Close(UNAUTHORIZED, "an API key is needed")
        return _Close(UNKNOWN, "no song has this id")
    except HeartMulaError as error:
        log.warning("%s: events cannot be followed: %s", job_id[:64], error)
        return _Close(RECONNECT, "a server does not answer; connect again")
    except _SEND_ERRORS as error:  # a client that does not read would not read a reason either
        raise _Gone from error
    except Exception:
        log.exception("%s: unexpected error on a websocket", job_id[:64])
        return _Close(FAULT, "a fault of the gateway; its log says more")
    return _Close(DONE, "the song has ended")
