"""Work that outlives the request that began it."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from shared.aio import end

log = logging.getLogger(__name__)


class BackgroundTasks:
    """Tasks that no response waits for. What one of them raises is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin a task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def close(self, patience: float) -> None:
        """Let running tasks finish for `patience` seconds, then cancel them."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=patience)
        await end(*self._tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("unexpected %s", type(error).__name__, exc_info=error)
