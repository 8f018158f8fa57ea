"""Websocket connections with limits: bounded buffers, and an end once the client is gone."""

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

_BUFFER = 32 * 1024  # bytes that the kernel and the event loop may each hold for a client that does not read
STALL_SECONDS = 10.0  # for which a client may leave its buffer full
ABORT_SECONDS = 12.0  # longer than uvicorn waits for a closing handshake


class WebSocketConnection(WebSocketsSansIOProtocol):
    """uvicorn's websocket connection, which ends for certain.

    A transport that is closed waits until its buffer is empty: forever, with a client that is connected and does not
    read. And the kernel alone would buffer megabytes for it.
    """

    _abortion: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Bound the buffers."""
        super().connection_made(transport)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self.transport.set_write_buffer_limits(high=_BUFFER)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        for timer in (self._abortion, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start a timer: the buffer is full. It costs nothing while clients read; one around every frame would."""
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer: the client has read."""
        if self._stall is not None:
            self._stall.cancel()
        super().resume_writing()

    def send(self, message: Any) -> Coroutine[Any, Any, None]:
        """Send what the application says. An HTTP response ends a handshake too, which uvicorn would log as a fault."""
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True
        return super().send(message)

    def keepalive_timeout(self) -> None:
        """Close the connection, for certain: no pong came."""
        super().keepalive_timeout()
        self._abort_soon()

    async def run_asgi(self) -> None:
        """Run the application for this socket, and see to it that the connection ends afterwards."""
        await super().run_asgi()
        self._abort_soon()

    def _abort_soon(self) -> None:
        if self in cast("set[Any]", self.connections) and self._abortion is None:
            self._abortion = self.loop.call_later(ABORT_SECONDS, self.transport.abort)
