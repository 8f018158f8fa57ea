"""The local stack: embedded servers and services, started in the order in which they need each other.

Parts stop in reverse order. One that ends unasked is started again (`supervisor`); one that does so too often, or
because of a wrong setting, ends the stack. When this process is killed, the kernel kills them (`parent_death`).
"""

import asyncio
import fcntl
import http.client
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from deploy.local.credentials import load_credentials
from deploy.local.process import Process
from deploy.local.servers.embedded import ROLES, NatsServer, PortInUse, Reader, Role, S3Server, Server, StartFailed
from deploy.local.servers.ports import keep_ports, port_is_free
from deploy.local.servers.watchdog import Healer
from deploy.local.supervisor import RUNNING, STARTING, Part, Supervisor
from deploy.setup import reach_store, set_up
from shared.aio import end
from shared.errors import ConfigError
from shared.settings import Settings

_GATEWAY_SECONDS = 60.0
_WORKERS_SECONDS = 120.0  # torch alone takes half a minute to import from a cold disk
_LOG_SECONDS = 5.0  # between two looks at how long the logs are
_WRONG_SETTING = 2  # exit code of a service (shared.entrypoint)


@dataclass(frozen=True)
class Service:
    """A service of this project and how it is started."""

    name: str
    role: Role  # as whom it speaks to the embedded NATS
    command: tuple[str, ...]
    grace: float = 15.0  # seconds from SIGTERM to SIGKILL; a worker gives its song back meanwhile

    @classmethod
    def module(cls, name: str, role: Role, module: str) -> "Service":
        """A service that is a Python module."""
        return cls(name, role, (sys.executable, "-m", module))


GATEWAY = Service.module("gateway", "gateway", "services.gateway")
WORKERS = (
    Service.module("codec worker", "codec", "services.codec_worker"),
    Service.module("tokenizer worker", "tokenizer", "services.tokenizer_worker"),
)


def _say(sentence: str) -> None:
    print(sentence, flush=True)


async def _prepare(settings: Settings) -> None:
    """Wait for the servers that these settings name, and make in them what is missing."""
    waiting = [asyncio.ensure_future(set_up(settings, say=_say))] if settings.nats_url else []
    if settings.s3_endpoint:
        waiting.append(asyncio.ensure_future(reach_store(settings, say=_say)))
    try:
        await asyncio.gather(*waiting)
    finally:
        await end(*waiting)


class Stack:
    """Everything that `make run` runs. `run` is called once, in the main thread."""

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        gateway: Service = GATEWAY,
        workers: Sequence[Service] = WORKERS,
        prepare: Callable[[Settings], Awaitable[None]] = _prepare,
    ) -> None:
        self._settings = settings
        self._environ = dict(environ)
        self._gateway = gateway
        self._workers = workers
        self._prepare = prepare
        self._host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        self._parts: list[Supervisor] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Start everything, say ``ready: <url>``, and stop everything on SIGINT, SIGTERM or SIGHUP.

        Raises `ConfigError` when something must be set otherwise, `StartFailed` when a part never gets ready, ends
        again and again, or ends because of its settings.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means what it says
                loop.add_signal_handler(number, self._interrupt)
        with _only_stack(self._settings.data_dir):
            starting = asyncio.create_task(self._start())
            starting.add_done_callback(self._ended)
            self._watch(self._bound_logs())
            try:
                await self._outcome
            finally:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                await self._stop()

    async def restart(self, name: str) -> None:
        """Stop and start the part of this name ("nats", "s3", "gateway", …); the others meet a short outage.

        Raises `KeyError` when there is no such part, `StartFailed` or `PortInUse` when the start fails, which is then
        tried again as after any other end.
        """
        parts = {supervisor.part.name: supervisor for supervisor in self._parts}
        await parts[name].restart()

    async def _start(self) -> None:
        settings = self._settings
        if not port_is_free(settings.port, settings.host):
            raise PortInUse(f"port {settings.port} for the gateway is in use: set HEARTMULA_PORT to another port")
        keep_ports([settings.port])
        await self._prepare(settings)  # the user's own servers, before any other is started
        servers: list[Server] = []
        nats_urls: dict[Role, str] = {}
        known = load_credentials(settings.data_dir)
        if not settings.nats_url:
            broker = NatsServer(settings.data_dir, settings.nats_port, known.nats_passwords)
            nats_urls = {role: broker.url_of(role) for role in ROLES}
            servers.append(broker)
        if not settings.s3_endpoint:
            reader = Reader(known.s3_reader_access_key, known.s3_reader_secret_key, settings.s3_bucket)
            store = S3Server(
                settings.data_dir, settings.s3_port, known.s3_access_key, known.s3_secret_key, reader=reader
            )
            self._environ["HEARTMULA_S3_ENDPOINT"] = store.url
            self._environ["HEARTMULA_S3_ACCESS_KEY"] = store.access_key
            self._environ["HEARTMULA_S3_SECRET_KEY"] = store.secret_key
            servers.append(store)
        if not settings.webhook_secret:
            self._environ["HEARTMULA_WEBHOOK_SECRET"] = known.webhook_secret
        for server in servers:
            await self._add(server)
        if servers:
            self._watch(Healer(servers, settings.s3_bucket, self.restart).run())
        if nats_urls:
            await self._prepare(replace(settings, nats_url=nats_urls["bootstrap"], s3_endpoint=""))
        await self._add(self._service(self._gateway, nats_urls, {}), {_WRONG_SETTING})
        await self._until("/livez", "the gateway", _GATEWAY_SECONDS)
        threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())}
        for worker in self._workers:
            await self._add(self._service(worker, nats_urls, threads), {_WRONG_SETTING})
        # Without workers the gateway is healthy too: songs may wait for them.
        await self._until("/health", "the workers", _WORKERS_SECONDS, said='"status":"ok"')
        for supervisor in self._parts:
            supervisor.patience = RUNNING
        host = f"[{self._host}]" if ":" in self._host else self._host
        print(f"ready: http://{host}:{settings.port}", flush=True)

    def _service(self, service: Service, nats_urls: Mapping[Role, str], defaults: Mapping[str, str]) -> Process:
        env = {**defaults, **self._environ}
        if nats_urls:
            env["HEARTMULA_NATS_URL"] = nats_urls[service.role]
        return Process(service.name, service.command, env=env, grace=service.grace)

    async def _add(self, part: Part, final_codes: Collection[int] = ()) -> None:
        print(f"starting {part.name}", flush=True)
        supervisor = Supervisor(part, STARTING, final_codes)
        self._parts.append(supervisor)
        await part.start()
        self._watch(supervisor.watch())

    def _watch(self, work: Coroutine[Any, Any, NoReturn]) -> None:
        watcher = asyncio.create_task(work)
        watcher.add_done_callback(self._ended)
        self._watchers.append(watcher)

    async def _bound_logs(self) -> NoReturn:
        while True:
            for supervisor in self._parts:
                supervisor.part.bound_log()
            await asyncio.sleep(_LOG_SECONDS)

    async def _until(self, path: str, who: str, seconds: float, said: str = "") -> None:
        deadline = time.monotonic() + seconds
        answer = (0, "")
        while answer[0] != 200 or said not in answer[1]:
            if time.monotonic() > deadline:
                last = f": GET {path} says {answer[0]} {answer[1]}" if answer[0] else ""
                raise StartFailed(f"{who} did not get ready within {seconds:g} s{last}")
            await asyncio.sleep(0.1)
            answer = await asyncio.to_thread(self._get, path)

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self._host, self._settings.port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read(1000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()

    def _interrupt(self) -> None:
        if self._outcome.done():  # asked twice: no more patience
            for supervisor in self._parts:
                supervisor.part.kill()
        else:
            self._outcome.set_result(None)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self._outcome.done():
            self._outcome.set_exception(error)

    async def _stop(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for supervisor in reversed(self._parts):
            await supervisor.part.stop()


@contextmanager
def _only_stack(data_dir: Path) -> Iterator[None]:
    """Hold the data folder's lock, which the kernel takes back however this process ends."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"HEARTMULA_DATA_DIR={data_dir} cannot be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another stack runs on {data_dir.absolute()}: stop it, or set HEARTMULA_DATA_DIR to another folder"
            ) from None
        yield
    finally:
        os.close(lock)
