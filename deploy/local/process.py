"""Child process in its own process group, which cannot outlive this process."""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_PARENT_DEATH = Path(__file__).with_name("parent_death.py")
_LOG_LIMIT = 10_000_000  # bytes; a longer log is rotated, replacing the previous rotated one
_LOG_LINES, _LOG_TAIL = 15, 16_384  # lines and bytes of a log that are shown at most


class Process:
    """A command that can be started, waited for, stopped, killed and started again.

    With `log` its output is appended to that file, otherwise it inherits the output of this process. It is never a
    pipe, which a grandchild could hold open after the child has ended.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
        grace: float = 10.0,
        umask: int = -1,
        log_limit: int = _LOG_LIMIT,
    ) -> None:
        """`grace` is the seconds from SIGTERM to SIGKILL, `log_limit` in bytes; `umask` is inherited by default."""
        self.name = name
        self.grace = grace
        self._command = list(command)
        self._env = env
        self._cwd = cwd
        self._log = log
        self._umask = umask
        self._log_limit = log_limit
        self._log_start = 0
        self._child: asyncio.subprocess.Process | None = None
        self._group_killed: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Id of the process and of its process group."""
        return self._started().pid

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while running or before the first start."""
        return self._child.returncode if self._child else None

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._child is not None and self._child.returncode is None

    async def start(self) -> None:
        """Start the command, for the first time or after it has ended."""
        if self.running:
            raise RuntimeError(f"{self.name} is running already")
        output = None
        if self._log:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self.rotate_log()
            output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._log_start = os.fstat(output).st_size
        try:
            self._child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_PARENT_DEATH), str(os.getpid()), *self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._env,
                cwd=self._cwd,
                umask=self._umask,
                start_new_session=True,  # Ctrl-C reaches only this process, which then stops its children in order
            )
        finally:
            if output is not None:
                os.close(output)

    async def wait(self) -> int:
        """Wait until the process has ended, kill the rest of its process group and return the exit code."""
        child = self._started()
        code = await child.wait()
        if self._child is child is not self._group_killed:  # only once: the id may be reused for another group later
            self._group_killed = child
            self._signal(signal.SIGKILL)
        return code

    async def stop(self) -> None:
        """Send SIGTERM to the process group, and SIGKILL to the rest of it after `grace` seconds."""
        if self._child is None:
            return
        if self.running:
            self._signal(signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.grace):
                    await self._child.wait()
            self.kill()
        await self.wait()

    def kill(self) -> None:
        """Send SIGKILL to the process group. The process has ended when `wait` returns."""
        if self.running:
            self._signal(signal.SIGKILL)

    def rotate_log(self) -> None:
        """Move a log that has become too long to ``<name>.old``, whether the command runs or not.

        The log is copied and truncated, because a running command keeps writing to its open file. A line that is
        written between the two is lost.
        """
        if not self._log:
            return
        with suppress(OSError):  # a failed rotation must not end the process that writes
            if self._log.stat().st_size <= self._log_limit:
                return
            old = self._log.with_suffix(".old")
            try:
                shutil.copyfile(self._log, old)
                old.chmod(0o600)
            except OSError:  # the disk is full: free the space instead of keeping the text
                old.unlink(missing_ok=True)
            os.truncate(self._log, 0)
            self._log_start = 0

    def exit_report(self) -> str:
        """Describe how the process ended: the exit code or signal, and on further lines the end of its log."""
        code = self.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        return f"{self.name} {how}{self.log_end()}"

    def log_end(self) -> str:
        """Return the last lines that it has logged since its start, with an introduction; empty without a log."""
        if not self._log or not self._log.exists():
            return ""
        with self._log.open("rb") as file:
            file.seek(max(self._log_start, self._log.stat().st_size - _LOG_TAIL))
            lines = file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
        return "; its log ends:\n" + "\n".join(lines)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._started().pid, number)

    def _started(self) -> asyncio.subprocess.Process:
        if self._child is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._child
