"""A child process in a process group of its own, which cannot outlive this process."""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_GUARD = Path(__file__).with_name("parent_death.py")
_LOG_LIMIT = 10_000_000  # bytes; a longer log is set aside, in place of the one that was set aside before
_LOG_LINES, _LOG_TAIL = 15, 16_384  # lines and bytes of a log that are shown


class Process:
    """One command that can be started, watched, stopped, killed and started again.

    With `log` its output is appended to that file, else it inherits this process's: never a pipe, which a grandchild
    could hold open after the child's death.
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
        """`umask` is the command's, this process's by default; `log_limit` is in bytes (see `bound_log`)."""
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
        self._swept: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Process id, which is the process group's too."""
        return self._started().pid

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while running or before the first start."""
        return self._child.returncode if self._child else None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._child is not None and self._child.returncode is None

    async def start(self) -> None:
        """Start the command, for the first time or after it ended."""
        if self.running:
            raise RuntimeError(f"{self.name} is running already")
        output = None
        if self._log:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self.bound_log()
            output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._log_start = os.fstat(output).st_size
        try:
            self._child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), *self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._env,
                cwd=self._cwd,
                umask=self._umask,
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops children in order
            )
        finally:
            if output is not None:
                os.close(output)

    async def wait(self) -> int:
        """Wait for the end, kill what is left of the process group and return the exit code."""
        child = self._started()
        code = await child.wait()
        if self._child is child is not self._swept:  # once: the number may belong to a stranger's group later
            self._swept = child
            self._signal(signal.SIGKILL)
        return code

    async def stop(self) -> None:
        """SIGTERM to the process group, SIGKILL to what is left of it after `grace` seconds."""
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
        """SIGKILL to the process group, at once. It has ended when `wait` returns."""
        if self.running:
            self._signal(signal.SIGKILL)

    def bound_log(self) -> None:
        """Set the log aside, as ``<name>.old``, when it has become too long, whether the command runs or not.

        It is copied and emptied, because a running command writes on into the file that it has; a line that it writes
        between the two is lost.
        """
        if not self._log:
            return
        with suppress(OSError):  # a log is not worth the end of what writes it
            if self._log.stat().st_size <= self._log_limit:
                return
            old = self._log.with_suffix(".old")
            try:
                shutil.copyfile(self._log, old)
                old.chmod(0o600)
            except OSError:  # the disk is full: now its room is worth more than its text
                old.unlink(missing_ok=True)
            os.truncate(self._log, 0)
            self._log_start = 0

    def exit_report(self) -> str:
        """How it ended, for the user: the exit code or signal, and the end of its log on further lines."""
        code = self.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        return f"{self.name} {how}{self.log_end()}"

    def log_end(self) -> str:
        """The last lines that it wrote since its last start, introduced; empty without a log."""
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
