"""The client's tools over HTTP, stateless: each message is answered by itself, whichever gateway it comes to."""

import asyncio
import logging
from contextvars import ContextVar
from typing import cast

from litestar.types import Message, Receive, Scope, Send
from mcp.server.transport_security import TransportSecuritySettings
from starlette import types as starlette

from heartmula_client.mcp import SongServer, SongService
from services.gateway.api.http_protocol import cut
from services.gateway.api.sse import SEND_SECONDS
from services.gateway.auth.api_keys import Caller
from services.gateway.mcp.parts import Parts
from services.gateway.mcp.songs import GatewaySongService
from shared.schema.request import MAX_BODY


class McpServer:
    """The MCP server of one gateway."""

    def __init__(self, parts: Parts) -> None:
        logging.getLogger("mcp").setLevel(logging.WARNING)
        self._parts = parts
        self._service: ContextVar[SongService] = ContextVar("service")
        server = SongServer(self._service.get)
        server.streamable_http_app(
            stateless_http=True,
            max_request_body_size=MAX_BODY,
            # Host and origin are checked before, by the gateway's guards.
            transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
        )
        self._manager = server.session_manager

    async def run(self, ready: asyncio.Event) -> None:
        """Answer messages until cancelled."""
        async with self._manager.run():
            ready.set()
            await asyncio.Event().wait()

    async def answer(self, caller: Caller, url: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one message, while `run` runs. An ASGI application but for its first two arguments."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        # All tasks that answer this message inherit it.
        self._service.set(GatewaySongService(self._parts, caller, url))
        try:
            await self._manager.handle_request(
                cast("starlette.Scope", scope),
                cast("starlette.Receive", receive),
                cast("starlette.Send", send_in_time),
            )
        except* (OSError, TimeoutError):  # a client that does not read cannot be sent anything
            await cut(scope)
