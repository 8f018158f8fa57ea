"""The stack under test: real servers and services as processes, each of which can be killed and comes back."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import httpx

from deploy.local.process import Process
from deploy.local.servers.embedded import ROLES, NatsServer, Role, S3Server, Server, free_port
from deploy.local.servers.watchdog import Watchdog
from deploy.setup import set_up
from shared.aio import end
from shared.settings import Settings
from tests.integration.flow import as_role, environment
from tests.integration.volumes import Volume, mounted

START_SECONDS = 60.0
RESTART_SECONDS = 0.2  # before a part that ended is started again


class Part:
    """A service process that is started again whenever it ends, as systemd would do."""

    def __init__(self, name: str, role: Role, settings: Settings, logs: Path, log: Callable[[str], None]) -> None:
        self.name, self.settings = name, settings
        self.busy = asyncio.Lock()  # one fault at a time
        self.deaths: dict[int, float] = {}  # process id → when it was killed, or was seen to have ended by itself
        self.crashes: list[str] = []  # ends that no fault caused
        module = "services.gateway" if role == "gateway" else f"services.{role}_worker"
        if role == "tokenizer" and settings.engine == "trivial":
            module = "tests.chaos.poisoned"  # the same engine, for which some songs are impossible
        self._process = Process(
            name, (sys.executable, "-m", module), env=environment(settings, role), log=logs / f"{name}.log", grace=20
        )
        self._log = log
        self._asked: set[int] = set()
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process, and again whenever it ends, until `stop`."""
        await self._process.start()
        self._keeper = asyncio.create_task(self._keep_running())

    async def stop(self) -> int | None:
        """End the process by SIGTERM for good; returns its exit code."""
        if self._keeper is None:
            return None
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        with suppress(ProcessLookupError):
            if self._process.running:
                os.killpg(self._process.pid, signal.SIGCONT)
        await self._process.stop()
        self.deaths.setdefault(self._process.pid, time.time())
        return self._process.returncode

    async def crash(self) -> None:
        """End the process by SIGKILL for good; returns when it has ended."""
        if self._keeper is not None:
            self._keeper.cancel()
        self.send(signal.SIGKILL)
        await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self._process.running:
            pid = self._process.pid
            if number in (signal.SIGKILL, signal.SIGTERM):
                self._asked.add(pid)
            if number == signal.SIGKILL:
                self.deaths[pid] = time.time()
            with suppress(ProcessLookupError):
                os.killpg(pid, number)

    async def wait_for_restart(self, pid: int) -> None:
        """Wait until the part runs again after its process `pid` has ended."""
        while not self._process.running or self._process.pid == pid:
            await asyncio.sleep(0.05)

    @property
    def pid(self) -> int:
        """Id of the part's present process, or of its last one."""
        return self._process.pid

    async def _keep_running(self) -> None:
        while True:
            pid = self._process.pid
            code = await self._process.wait()
            self.deaths.setdefault(pid, time.time())
            if pid not in self._asked:
                self.crashes.append(f"{self.name} ({pid}) ended by itself with exit code {code}")
                self._log(self.crashes[-1])
            await asyncio.sleep(RESTART_SECONDS)
            await self._process.start()


class Stack:
    """Both servers, gateways, and a pair of workers for each card."""

    nats: NatsServer  # unless it is a cluster
    volume: Volume | None = None  # on which the servers' data lie, if it is one of their own

    def __init__(
        self,
        settings: Settings,
        store: S3Server,
        logs: Path,
        gateways: int,
        cards: Sequence[str],
    ) -> None:
        self.settings, self.store, self.logs = settings, store, logs
        self.began = time.monotonic()
        names = ["gateway"] if gateways == 1 else [f"gateway-{n + 1}" for n in range(gateways)]
        self.gateways = [self._part(name, "gateway", port=free_port()) for name in names]
        self.tokenizers = [self._part(f"tokenizer-{c}", "tokenizer", gpu_id=c) for c in cards]
        self.codecs = [self._part(f"codec-{c}", "codec", gpu_id=c) for c in cards]

    @property
    def servers(self) -> list[Server]:
        """Both servers."""
        return [self.nats, self.store]

    @property
    def workers(self) -> list[Part]:
        """Workers of both roles."""
        return [*self.tokenizers, *self.codecs]

    @property
    def parts(self) -> list[Part]:
        """All services."""
        return [*self.gateways, *self.workers]

    @property
    def urls(self) -> list[str]:
        """URLs of the gateways."""
        return [f"http://127.0.0.1:{part.settings.port}" for part in self.gateways]

    def log(self, line: str) -> None:
        """Print a line about what happens in the run, with its time."""
        print(f"{time.monotonic() - self.began:7.2f}  {line}", file=sys.stderr, flush=True)

    async def start(self) -> None:
        """Start all services; returns when they serve."""
        for part in self.parts:
            await part.start()
        await _until(self._healthy, START_SECONDS, f"the services are not up; logs in {self.logs}")

    async def crash(self, seconds: float) -> None:
        """Kill servers and services at once and start them after `seconds`; returns when they serve."""
        for server in self.servers:
            server.kill()
        await asyncio.gather(*(part.crash() for part in self.parts))
        await asyncio.sleep(seconds)
        await self._start_all()

    async def restart(self) -> None:
        """Stop services and servers in order and start them again; returns when they serve."""
        await self.stop()
        await asyncio.gather(*(server.stop() for server in self.servers))
        await self._start_all()

    async def _start_all(self) -> None:
        await asyncio.gather(*(server.start() for server in self.servers))
        await self.start()

    async def stop_workers(self) -> list[int | None]:
        """Stop the workers as an operator would; returns their exit codes."""
        return await asyncio.gather(*(part.stop() for part in self.workers))

    async def stop(self) -> None:
        """Stop all services."""
        await asyncio.gather(*(part.stop() for part in self.parts))

    def _part(self, name: str, role: Role, **changes: object) -> Part:
        settings = replace(self.settings, **changes)  # type: ignore[arg-type]
        return Part(name, role, settings, self.logs, self.log)

    async def _healthy(self) -> bool:
        wanted = {"tokenizer": len(self.tokenizers), "codec": len(self.codecs)}
        async with httpx.AsyncClient(trust_env=False, timeout=5) as http:
            for url in self.urls:
                try:
                    body = (await http.get(f"{url}/health")).json()
                except (httpx.TransportError, ValueError):
                    return False
                if body["status"] != "ok" or body["workers"] != wanted:
                    return False
        return True


@asynccontextmanager
async def open_stack(
    folder: Path,
    settings: Settings,
    *,
    gateways: int = 1,
    cards: Sequence[str] = ("card",),
    figures: bool = False,
    disk_mb: int = 0,
) -> AsyncIterator[Stack]:
    """A stack that serves, with the data of its servers below `folder`.

    `settings` says everything but where the servers are. With `figures` the servers publish their metrics. With
    `disk_mb` the servers have a volume of that size, and are restarted when they can no longer write. Raises
    `CannotMount`.
    """
    ports = (free_port(), free_port()) if figures else (0, 0)
    with ExitStack() as volumes:
        volume = volumes.enter_context(mounted(folder / "volume", disk_mb)) if disk_mb else None
        below = volume.folder if volume else folder
        nats = NatsServer(below, free_port(), dict.fromkeys(ROLES, "secret"), monitor_port=ports[0])
        store = S3Server(below, free_port(S3Server.ports), "chaos", "secretsecret", metrics_port=ports[1])
        settings = replace(
            settings,
            nats_url=nats.url,
            s3_endpoint=store.url,
            s3_access_key=store.access_key,
            s3_secret_key=store.secret_key,
            data_dir=folder / "data",
        )
        servers: dict[str, Server] = {"nats": nats, "s3": store}

        async def restart(name: str) -> None:
            servers[name].kill()
            await servers[name].start()
            stack.log(f"{name} was started again")

        stack = Stack(settings, store, folder / "logs", gateways, cards)
        stack.nats, stack.volume = nats, volume
        healing: list[asyncio.Task[NoReturn]] = []
        try:
            await asyncio.gather(*(server.start() for server in servers.values()))
            await set_up(as_role(settings, "bootstrap"))
            await stack.start()
            if volume:
                watchdog = Watchdog([nats, store], settings.s3_bucket, restart, every=1.0)
                healing.append(asyncio.create_task(watchdog.run()))
            yield stack
        finally:
            await end(*healing)
            await stack.stop()
            await asyncio.gather(*(server.stop() for server in servers.values()))


async def _until(ask: Callable[[], Awaitable[bool]], patience: float, what: str) -> None:
    deadline = time.monotonic() + patience
    while not await ask():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        await asyncio.sleep(0.1)
