"""Waiting with progress, for so long at most."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mcp.server.mcpserver import Context

from heartmula_client.responses import Event


class Progress:
    """Progress of one call. The protocol wants every report to be above the one before."""

    def __init__(self, context: Context) -> None:
        self._context, self._latest = context, -1.0

    async def report(self, percent: float, message: str) -> None:
        """Report progress, unless there is none since the report before."""
        if percent > self._latest:
            self._latest = percent
            await self._context.report_progress(percent, 100, message)


def describe(event: Event) -> str:
    """The state of a song as the message beside its progress."""
    if event.not_before and event.status == "queued":
        return f"waits until {event.not_before}"
    if event.status == "queued":
        before = event.queue_position
        return "queued" if before is None else f"queued, {before} before it"
    eta = f", expected to be completed at {event.eta}" if event.eta else ""
    return f"{event.status}{eta}"


@asynccontextmanager
async def at_most(seconds: float) -> AsyncIterator[None]:
    """Do something for so many seconds at the longest, and go on after it either way."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
