"""Cancels asyncio tasks reliably."""

import asyncio
from typing import Any


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended; what they raise is dropped.

    One `cancel` is not enough: before Python 3.12 `asyncio.wait_for`, which nats-py has in every request, swallows a
    cancellation that comes together with the answer, and the task goes on.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.2)
    await asyncio.gather(*tasks, return_exceptions=True)
