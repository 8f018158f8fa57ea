"""Supervision of parts that end unexpectedly: how often, how soon and after which exit codes they are restarted."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local.process import Process
from deploy.local.servers.base import StartFailed
from deploy.local.supervisor import RUNNING, RestartPolicy, Supervisor

PATIENCE = 30.0
QUICK = RestartPolicy(max_ends=4, first_delay=0.01)


def part(folder: Path, code: str) -> Process:
    """Make a part that records each of its starts as a line of a file."""
    begin = f"import os, sys, time; print(os.getpid(), file=open({str(folder / 'starts')!r}, 'a'), flush=True)\n"
    return Process("part", [sys.executable, "-c", begin + code], grace=PATIENCE)


def starts(folder: Path) -> list[int]:
    path = folder / "starts"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_part_that_ends_too_often_is_not_restarted(tmp_path: Path) -> None:
    supervisor = Supervisor(part(tmp_path, "sys.exit(3)"), QUICK)
    await supervisor.part.start()
    with pytest.raises(StartFailed) as failed:
        await supervisor.watch()
    assert str(failed.value) == "part ended 4 times within 10 minutes; lastly, part ended with exit code 3"
    assert len(starts(tmp_path)) == 4


async def test_ends_before_the_window_do_not_count(tmp_path: Path) -> None:
    supervisor = Supervisor(part(tmp_path, "sys.exit(3)"), RestartPolicy(max_ends=2, window=0.001, first_delay=0.01))
    await supervisor.part.start()
    watching = asyncio.create_task(supervisor.watch())
    await until(lambda: len(starts(tmp_path)) > 5)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await supervisor.part.stop()


async def test_a_part_that_ends_with_a_final_code_is_not_restarted(tmp_path: Path) -> None:
    supervisor = Supervisor(part(tmp_path, "sys.exit(2)"), QUICK, {2})
    await supervisor.part.start()
    with pytest.raises(StartFailed, match="part ended with exit code 2"):
        await supervisor.watch()
    assert len(starts(tmp_path)) == 1


async def test_a_start_that_the_system_refuses_counts_as_an_end(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    supervisor = Supervisor(Process("part", ["true"], cwd=tmp_path / "folder"), QUICK)
    await supervisor.part.start()
    await supervisor.part.wait()
    (tmp_path / "folder").rmdir()
    with pytest.raises(StartFailed) as failed:
        await supervisor.watch()
    assert str(failed.value) == (
        "part ended 4 times within 10 minutes; lastly, part cannot be started: No such file or directory"
    )


async def test_a_restart_on_demand_does_not_count_as_an_end(tmp_path: Path) -> None:
    supervisor = Supervisor(part(tmp_path, "time.sleep(1000)"), RestartPolicy(max_ends=2, first_delay=1000))
    await supervisor.part.start()
    watching = asyncio.create_task(supervisor.watch())
    for count in (1, 2, 3):
        await until(lambda count=count: len(starts(tmp_path)) == count)  # type: ignore[misc]
        await supervisor.restart()
    await until(lambda: len(starts(tmp_path)) == 4)
    assert not watching.done()
    os.kill(starts(tmp_path)[-1], signal.SIGKILL)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await supervisor.part.stop()


def test_delays_grow_up_to_a_limit() -> None:
    delays = [RUNNING.delay(ends) for ends in range(1, RUNNING.max_ends)]
    assert delays == [0.5, 1, 2, 4, 8, 15, 15, 15, 15]
