"""HTTP connections: bounded in number, and in the time that a client may take to send a request.

uvicorn waits forever for a request's head and body, and accepts until the process has no file descriptor left.
"""

import asyncio
import logging
import math
from enum import Enum, auto
from typing import Any, cast

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from services.gateway.errors import MEDIA_TYPE, ApiError

log = logging.getLogger(__name__)

HEAD_SECONDS = 20.0  # to a request's whole head, from the connection or from its first byte
BODY_SECONDS = 60.0  # for a whole body
STILL_SECONDS = 10.0  # in which a body must move
LINGER_SECONDS = 300.0  # that a client may take to read the rest of an answer, once the connection is to be closed
MAX_HEAD = 64 * 1024  # bytes
_WARN_SECONDS = 60.0  # between two lines that say that the connections are too many


class Connections:
    """Which connections of a server may be closed for newcomers: those without a request in flight."""

    def __init__(self, most: int) -> None:
        """`most` connections may be open, websockets included."""
        self.most = most
        self._idle: dict[HttpConnection, None] = {}  # in the order in which something happened on them last
        self._warned = -math.inf

    def rest(self, connection: "HttpConnection") -> None:
        """Note that a connection has no request in flight, and that something has just happened on it."""
        self._idle.pop(connection, None)
        self._idle[connection] = None

    def leave(self, connection: "HttpConnection") -> None:
        """Note that a connection is at work, gone, or a websocket."""
        self._idle.pop(connection, None)

    def make_room(self, now: float) -> bool:
        """Close the connection that has been idle longest. False where there is none."""
        if now > self._warned + _WARN_SECONDS:
            self._warned = now
            log.warning("%d connections are open, as many as may: idle ones are closed for newcomers", self.most)
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        oldest.drop()
        return True


class Part(Enum):
    """What of the latest request has arrived."""

    NOTHING = auto()
    HEAD = auto()  # some of it
    BODY = auto()  # the head, and perhaps some of the body
    ALL = auto()


class HttpConnection(HttpToolsProtocol):
    """uvicorn's, with limits. All timers end when the connection becomes a websocket's."""

    def __init__(self, among: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._among = among
        self._part, self._since, self._head_bytes = Part.NOTHING, self.loop.time(), 0
        self._timer: asyncio.TimerHandle | None = None

    # --- what happens on it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room among the others, or refuse this one where all have requests in flight."""
        super().connection_made(transport)
        if len(self.connections) > self._among.most and not self._among.make_room(self.loop.time()):
            self._refuse(503, "unavailable", "as many clients are being served as can be; try again", b"15")
        self._judge()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to wait for."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came, and see what is still to come."""
        super().data_received(data)
        if self.transport.get_protocol() is not self:  # a websocket now
            return
        if self._part is Part.HEAD:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD and not self.transport.is_closing():
                self._refuse(431, "refused", f"the head of a request may have at most {MAX_HEAD // 1024} KiB")
        self._judge()

    def on_message_begin(self) -> None:
        """The first byte of a request is there."""
        super().on_message_begin()
        self._part, self._since, self._head_bytes = Part.HEAD, self.loop.time(), 0

    def on_headers_complete(self) -> None:
        """The head of a request is there."""
        super().on_headers_complete()
        self._part, self._since = Part.BODY, self.loop.time()

    def on_message_complete(self) -> None:
        """All of a request is there."""
        super().on_message_complete()
        self._part = Part.ALL

    def on_response_complete(self) -> None:
        """A request was answered."""
        held_back = bool(self.pipeline)  # what came ahead of its turn was not read on
        super().on_response_complete()
        if held_back or self._part is not Part.BODY:
            self._since = self.loop.time()
        self._judge()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        super().timeout_keep_alive_handler()
        self._judge()

    def handle_websocket_upgrade(self) -> None:
        """Another protocol takes over, with limits of its own."""
        self._stop()
        super().handle_websocket_upgrade()

    # --- what follows

    @property
    def _in_flight(self) -> bool:
        """Whether the client waits for an answer that it need not send any more for."""
        if self.pipeline:
            return True
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first head
        return self._part is not Part.BODY and cycle is not None and not cycle.response_complete

    def _judge(self) -> None:
        """Set the timer for what the client has to do next."""
        self._stop()
        if self.transport.is_closing():
            self._among.rest(self)
            self._timer = self.loop.call_later(LINGER_SECONDS, self.drop)
        elif not self._in_flight:
            self._among.rest(self)
            until = self._since + HEAD_SECONDS
            if self._part is Part.BODY:
                until = min(self._since + BODY_SECONDS, self.loop.time() + STILL_SECONDS)
            self._timer = self.loop.call_at(until, self._give_up)

    def _stop(self) -> None:
        self._among.leave(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self._part is Part.BODY and self.flow.read_paused:  # it is this side that does not read
            self._since = self.loop.time()
            self._judge()
        elif self._part is Part.BODY and self.cycle.response_started:
            self.drop()
        else:
            self._refuse(408, "refused", "the request did not arrive in time")
            self._judge()

    def drop(self) -> None:
        """Close the connection at once."""
        self._stop()
        self.connections.discard(self)
        self.transport.abort()

    def _refuse(self, status: int, kind: str, detail: str, retry_after: bytes = b"") -> None:
        """Answer before any handler can, and close."""
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
