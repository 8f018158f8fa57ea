"""Child processes: they end together with their own children, and part of their output is kept."""

import asyncio
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from deploy.local.process import Process

PATIENCE = 30.0  # seconds until a test that waits for something gives up


def gone(pid: int) -> bool:
    """Whether a process has ended, including one that has not been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def python(code: str, log: Path, grace: float = PATIENCE) -> Process:
    return Process("part", [sys.executable, "-c", code], log=log, grace=grace)


async def until_written(log: Path) -> str:
    async with asyncio.timeout(PATIENCE):
        while not (log.exists() and log.read_text().endswith("\n")):
            await asyncio.sleep(0.02)
    return log.read_text()


async def test_a_part_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    part = python(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(1000)",
        log,
        grace=0.2,
    )
    await part.start()
    await until_written(log)
    await part.stop()
    assert part.returncode == -signal.SIGKILL


@pytest.mark.parametrize("how", ["stop", "kill", "exit"])
async def test_a_parts_own_children_end_with_it(tmp_path: Path, how: str) -> None:
    log = tmp_path / "log"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(1000)"
    part = python(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n" + ("" if how == "exit" else "time.sleep(1000)"),
        log,
    )
    await part.start()
    child_pid = int(await until_written(log))
    if how == "stop":
        await part.stop()
    elif how == "kill":
        part.kill()
    await part.wait()
    async with asyncio.timeout(PATIENCE):
        while not gone(child_pid):
            await asyncio.sleep(0.02)


async def test_a_dead_part_shows_the_end_of_this_starts_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    part = python("import os; print('first', os.getpid())", log)
    await part.start()
    first = part.pid
    await part.wait()
    await part.start()
    await part.wait()
    assert part.exit_report() == f"part ended with exit code 0; its log ends:\nfirst {part.pid}"
    assert log.read_text() == f"first {first}\nfirst {part.pid}\n"


async def test_a_command_that_does_not_exist_says_so(tmp_path: Path) -> None:
    part = Process("part", [str(tmp_path / "nothing")], log=tmp_path / "log")
    await part.start()
    assert await part.wait() == 1
    assert "nothing cannot be run: No such file" in part.exit_report()


async def test_a_long_log_is_rotated_while_its_part_keeps_writing(tmp_path: Path) -> None:
    log = tmp_path / "part.log"
    code = "import os, sys\nfor line in sys.stdin: os.write(1, line.encode())"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    part = Process("part", ["sh", "-c", f"exec {sys.executable} -c '{code}' < {fifo}"], log=log, log_limit=1000)
    await part.start()
    with fifo.open("w", buffering=1) as said:
        for number in range(3):
            said.write(f"{number}" * 2000 + "\n")
            await until_written(log)
            part.rotate_log()
            assert log.read_text() == ""
            assert (tmp_path / "part.old").read_text() == f"{number}" * 2000 + "\n"
            assert stat.S_IMODE((tmp_path / "part.old").stat().st_mode) == 0o600
        said.write("short\n")
        await until_written(log)
        part.rotate_log()
    await part.wait()
    assert part.exit_report() == "part ended with exit code 0; its log ends:\nshort"
    assert sorted(path.name for path in tmp_path.glob("part*")) == ["part.log", "part.old"]


async def test_two_waits_for_a_part_do_not_harm_its_next_start(tmp_path: Path) -> None:
    part = python("import time; print(1, flush=True); time.sleep(1000)", tmp_path / "log")
    await part.start()
    watching = asyncio.create_task(part.wait())
    await asyncio.sleep(0)
    await part.stop()
    await part.start()
    assert await watching == -signal.SIGTERM
    assert part.running
    await part.stop()
