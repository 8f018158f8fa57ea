"""Tasks that swallow their cancellation are ended all the same."""

import asyncio

from shared.aio import end


async def test_a_task_that_swallows_its_cancellation_ends_all_the_same() -> None:
    refusals = 2

    async def stubborn() -> None:
        nonlocal refusals
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                refusals -= 1
                if refusals < 0:
                    raise

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await end(task)
    assert task.cancelled()


async def test_what_ended_tasks_raise_is_dropped() -> None:
    async def failing() -> None:
        raise ValueError

    task = asyncio.create_task(failing())
    await asyncio.sleep(0)
    await end(task)
    assert task.done()
