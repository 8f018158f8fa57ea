"""Tasks that outlive the request that began them."""

import asyncio

import pytest

from services.gateway.tasks import BackgroundTasks


async def test_closing_waits_for_what_ends_in_time_and_cancels_the_rest() -> None:
    tasks, ended = BackgroundTasks(), []

    async def work(name: str, blocked: asyncio.Event) -> None:
        try:
            await blocked.wait()
            ended.append(f"{name} finished")
        except asyncio.CancelledError:
            ended.append(f"{name} was cancelled")
            raise

    soon, never = asyncio.Event(), asyncio.Event()
    tasks.spawn(work("one", soon))
    tasks.spawn(work("other", never))
    await asyncio.sleep(0)
    soon.set()
    await tasks.close(0.05)
    assert ended == ["one finished", "other was cancelled"]


async def test_an_error_in_a_task_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    tasks = BackgroundTasks()

    async def fail() -> None:
        raise ValueError("broken")

    tasks.spawn(fail())
    await tasks.close(5)
    assert "unexpected ValueError" in caplog.text
    assert "broken" in caplog.text


async def test_closing_without_tasks_returns() -> None:
    await BackgroundTasks().close(5)
