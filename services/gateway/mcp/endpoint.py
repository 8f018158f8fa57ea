"""The MCP server of a gateway, begun by the first request: to import what it needs takes a second and 35 MB."""

import asyncio
import functools
import logging
from typing import TYPE_CHECKING

from litestar.types import ASGIApp

from services.gateway.auth.api_keys import Caller
from services.gateway.errors import ApiError
from services.gateway.mcp.parts import Parts
from shared.aio import end

if TYPE_CHECKING:
    from services.gateway.mcp.server import McpServer

log = logging.getLogger(__name__)


class McpEndpoint:
    """Answers MCP messages for one gateway, where the packages for that are installed."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._starting = asyncio.Lock()
        self._server: McpServer | None = None
        self._task: asyncio.Task[None] | None = None

    async def answer_to(self, caller: Caller, url: str) -> ASGIApp:
        """What answers the message of a caller who reaches this service at `url`.

        Raises a 404 `ApiError` where the packages are not installed.
        """
        async with self._starting:
            if self._server is None:
                self._server = await self._start()
        return functools.partial(self._server.answer, caller, url)

    async def close(self) -> None:
        """End what is still being answered."""
        if self._task is not None:
            await end(self._task)
        await self._parts.fetcher.close()

    async def _start(self) -> "McpServer":
        try:
            server = await asyncio.to_thread(_make, self._parts)
        except ImportError as error:
            log.warning("MCP is not served: %s", error)
            raise ApiError(
                404,
                "not-found",
                "this gateway does not serve MCP, because packages are missing: in the project's folder, "
                "pip install './services/client[mcp]' puts them into its environment",
            ) from None
        ready = asyncio.Event()
        self._task = asyncio.create_task(server.run(ready))
        await ready.wait()
        return server


def _make(parts: Parts) -> "McpServer":
    from services.gateway.mcp.server import McpServer

    return McpServer(parts)
