"""HTTP connections with limits on their number, and on the time that a client may take to send a request.

uvicorn alone waits forever for a request's head and body, and accepts until the process has no file descriptor left.
"""

import asyncio
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, cast

import msgspec
from litestar.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from services.gateway.errors import MEDIA_TYPE, ApiError

log = logging.getLogger(__name__)

HEAD_SECONDS = 20.0  # for the whole head of a request, from the connection or from its first byte
BODY_SECONDS = 60.0  # for a whole body
STILL_SECONDS = 10.0  # for which a body may make no progress
LINGER_SECONDS = 300.0  # for a client to read the rest of a response, once the connection is to be closed
MAX_HEAD = 64 * 1024  # bytes
_WARN_SECONDS = 60.0  # between two log lines about too many connections
_CONNECTION = "heartmula.connection"  # extension of a scope


async def cut(scope: Scope) -> None:
    """Close a request's connection at once, so that the client sees its response end too early.

    uvicorn alone would wait until the client has read what was sent, and some never do.
    """
    if (connection := _connection_of(scope)) is not None:
        connection.drop()
        await asyncio.sleep(0)  # the loop reports the loss of the connection, which uvicorn expects before the end


@contextmanager
def at_own_pace(scope: Scope) -> Iterator[None]:
    """Read a request's body with limits of the reader's own: those of time do not hold meanwhile.

    Nor is the connection closed to make room for another one, as if there were no request in flight.
    """
    connection = _connection_of(scope)
    if connection is not None:
        connection.set_own_pace(True)
    try:
        yield
    finally:
        if connection is not None:
            connection.set_own_pace(False)


def is_whole(scope: Scope) -> bool:
    """Whether all of a request has arrived."""
    connection = _connection_of(scope)
    return connection is None or connection.is_whole


def _connection_of(scope: Scope) -> "HttpConnection | None":
    """The connection of a request; None in tests that have none."""
    found = (scope.get("extensions") or {}).get(_CONNECTION)
    return None if found is None else cast("HttpConnection", found["connection"])


class Connections:
    """The connections of a server. Those without a request in flight may be closed to make room for new ones."""

    def __init__(self, most: int) -> None:
        """`most` connections may be open, websockets included."""
        self.most = most
        self._idle: dict[HttpConnection, None] = {}  # ordered by the time of the latest event on them
        self._warned = -math.inf

    def set_idle(self, connection: "HttpConnection") -> None:
        """Record that a connection has no request in flight, and that something has just happened on it."""
        self._idle.pop(connection, None)
        self._idle[connection] = None

    def set_busy(self, connection: "HttpConnection") -> None:
        """Record that a connection has a request in flight, is closed, or has become a websocket."""
        self._idle.pop(connection, None)

    def make_room(self, now: float) -> bool:
        """Close the connection that has been idle longest. Returns False where none is idle."""
        if now > self._warned + _WARN_SECONDS:
            self._warned = now
            log.warning("%d connections are open, as many as may be: idle ones are closed for new ones", self.most)
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        oldest.drop()
        return True


class Part(Enum):
    """How much of the latest request has arrived."""

    NOTHING = auto()
    HEAD = auto()  # some of it
    BODY = auto()  # the head, and perhaps some of the body
    ALL = auto()


class HttpConnection(HttpToolsProtocol):
    """uvicorn's HTTP connection with limits. All timers end when it becomes a websocket."""

    def __init__(self, others: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._others = others
        self._part, self._since, self._head_bytes = Part.NOTHING, self.loop.time(), 0
        self._answered_early = False  # and not to be used again
        self._own_pace = False  # what reads the body limits its time
        self._timer: asyncio.TimerHandle | None = None

    # --- events on the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Close an idle connection where there are too many; refuse this one where all have requests in flight."""
        super().connection_made(transport)
        if len(self.connections) > self._others.most and not self._others.make_room(self.loop.time()):
            self._refuse(503, "unavailable", "as many clients are being served as can be; try again", b"15")
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, and set the timer for what is missing."""
        super().data_received(data)
        if self.transport.get_protocol() is not self:  # a websocket now
            return
        if self._part is Part.HEAD:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD and not self.transport.is_closing():
                self._refuse(431, "refused", f"the head of a request may have at most {MAX_HEAD // 1024} KiB")
        self._set_timer()

    def on_message_begin(self) -> None:
        """Begin with the head, at the first byte of a request."""
        super().on_message_begin()
        cast("dict[str, Any]", self.scope)["extensions"] = {_CONNECTION: {"connection": self}}
        self._part, self._since, self._head_bytes = Part.HEAD, self.loop.time(), 0

    def on_headers_complete(self) -> None:
        """Go on with the body, once the head is complete."""
        super().on_headers_complete()
        self._part, self._since = Part.BODY, self.loop.time()
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is not None and cycle.scope is self.scope:  # else a websocket begins
            cycle.transport = cast("asyncio.Transport", _PatientTransport(self))

    def on_message_complete(self) -> None:
        """Record that all of a request has arrived."""
        super().on_message_complete()
        self._part = Part.ALL
        if self._answered_early:
            self.transport.close()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of this one."""
        held_back = bool(self.pipeline)  # a pipelined request stopped the reading
        super().on_response_complete()
        if held_back or self._part is not Part.BODY:
            self._since = self.loop.time()
        self._set_timer()

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection: no further request came."""
        super().timeout_keep_alive_handler()
        self._set_timer()

    def handle_websocket_upgrade(self) -> None:
        """Hand over to the websocket protocol, which has limits of its own."""
        self._stop_timer()
        super().handle_websocket_upgrade()

    # --- limits

    @property
    def is_whole(self) -> bool:
        """Whether nothing more of the latest request is to come."""
        return self._part is not Part.BODY

    def set_own_pace(self, own: bool) -> None:
        """See `at_own_pace`."""
        self._own_pace, self._since = own, self.loop.time()
        if not self.transport.is_closing():
            self._set_timer()

    @property
    def _in_flight(self) -> bool:
        """Whether the client has sent everything and waits for a response, or is given its own time to send it."""
        if self.pipeline or self._own_pace:
            return True
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first head
        return self._part is not Part.BODY and cycle is not None and not cycle.response_complete

    def _set_timer(self) -> None:
        """Set the timer for what the client has to do next."""
        self._stop_timer()
        if self.transport.is_closing():
            self._others.set_idle(self)
            self._timer = self.loop.call_later(LINGER_SECONDS, self.drop)
        elif not self._in_flight:
            self._others.set_idle(self)
            until = self._since + HEAD_SECONDS
            if self._part is Part.BODY:
                until = min(self._since + BODY_SECONDS, self.loop.time() + STILL_SECONDS)
            self._timer = self.loop.call_at(until, self._time_out)

    def _stop_timer(self) -> None:
        self._others.set_busy(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        if self._part is Part.BODY and self.flow.read_paused:  # the gateway is not reading
            self._since = self.loop.time()
            self._set_timer()
        elif self._part is Part.BODY and self.cycle.response_started:
            self.drop()
        else:
            self._refuse(408, "refused", "the request did not arrive in time")
            self._set_timer()

    def close_patiently(self) -> None:
        """Close a connection after its response, and after the rest of the request has arrived, which is thrown away.

        What is not read resets a connection, and the client may lose the response that is on its way.
        """
        if self._part is not Part.BODY or self.transport.is_closing():
            self.transport.close()
            return
        self._answered_early = True
        self.transport.write_eof()

    def drop(self) -> None:
        """Close the connection at once."""
        self._stop_timer()
        self.connections.discard(self)
        self.transport.abort()

    def _refuse(self, status: int, kind: str, detail: str, retry_after: bytes = b"") -> None:
        """Answer with a problem detail, without any handler, and close."""
        body = msgspec.json.encode(ApiError(status, kind, detail).body())
        headers = {
            b"content-type": MEDIA_TYPE.encode(),
            b"content-length": str(len(body)).encode(),
            b"cache-control": b"no-store",
            b"connection": b"close",
        } | ({b"retry-after": retry_after} if retry_after else {})
        lines = [name + b": " + value + b"\r\n" for name, value in headers.items()]
        self.transport.write(b"".join((STATUS_LINE[status], *lines, b"\r\n", body)))
        self.transport.close()


class _PatientTransport:
    """A connection as its response sees it, which closes it."""

    def __init__(self, connection: HttpConnection) -> None:
        self._connection = connection

    def write(self, data: bytes) -> None:
        """Write a part of the response."""
        self._connection.transport.write(data)

    def is_closing(self) -> bool:
        """Whether the connection is being closed."""
        return self._connection.transport.is_closing()

    def close(self) -> None:
        """Close the connection when that loses nothing."""
        self._connection.close_patiently()
