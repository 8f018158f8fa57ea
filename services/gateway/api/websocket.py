"""The events of a song over a websocket, and close codes that say why they end."""

import asyncio
import contextlib
import logging
from typing import Any

from litestar import WebSocket, websocket
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect
from litestar.params import FromPath

from services.gateway.api.guards import CHECKS_ITSELF, PageRules, refuse_handshake
from services.gateway.auth.authenticate import Authenticator
from services.gateway.errors import ApiError
from services.gateway.events.store import Frame
from services.gateway.songs.event_feed import EventFeeds, EventsLost, event_id
from shared.errors import HeartMulaError

log = logging.getLogger(__name__)

Socket = WebSocket[Any, Any, Any]

DONE, REFUSED, FAULT, RECONNECT, UNAUTHORIZED, UNKNOWN = 1000, 1008, 1011, 1012, 4401, 4404
_SEND_ERRORS = (WebSocketDisconnect, OSError)


class _Close(Exception):
    """Ends a socket with a code that tells the client what to do."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class _Gone(Exception):
    """The client has left."""


@websocket("/generate/{job_id:str}/events", opt=CHECKS_ITSELF)
async def events(
    socket: Socket,
    authenticator: NamedDependency[Authenticator],
    event_feeds: NamedDependency[EventFeeds],
    rules: NamedDependency[PageRules],
    job_id: FromPath[str],
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
            close = await _follow(socket, authenticator, event_feeds, job_id)
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


async def _follow(socket: Socket, authenticator: Authenticator, feeds: EventFeeds, job_id: str) -> _Close:
    async def send(frame: Frame) -> None:
        await socket.send({"type": "websocket.send", "text": frame.data, "bytes": None})

    try:
        await feeds.follow(authenticator.caller(socket).tenant, job_id, _after(socket), send)
    except _Close as close:
        return close
    except EventsLost:
        return _Close(RECONNECT, "events were lost; connect again")
    except ApiError as error:
        if error.status == 401:  # a browser cannot tell a refused handshake from a server that is down
            return _Close(UNAUTHORIZED, "an API key is needed")
        return _Close(UNKNOWN, "no song has this id")
    except HeartMulaError as error:
        log.warning("%s: events cannot be followed: %s", job_id[:64], error)
        return _Close(RECONNECT, "a server does not answer; connect again")
    except _SEND_ERRORS as error:  # a client that does not read would not read a reason either
        raise _Gone from error
    except Exception:
        log.exception("%s: unexpected", job_id[:64])
        return _Close(FAULT, "a fault of the gateway; its log says more")
    return _Close(DONE, "the song has ended")


def _after(socket: Socket) -> int | None:
    text = socket.scope["query_string"].decode("latin-1")
    values = [value for name, _, value in (part.partition("=") for part in text.split("&")) if name == "after"]
    if not values or not values[-1]:
        return None
    try:
        return event_id(values[-1])
    except ValueError:
        raise _Close(REFUSED, "after must be the id of an event") from None
