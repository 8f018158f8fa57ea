"""Local stack: embedded servers and services, started in the order of their dependencies and stopped in reverse.

A part that ends unexpectedly is restarted (`supervisor`). A part that ends too often, or because of a wrong setting,
ends the stack. When this process is killed, the kernel kills all parts (`parent_death`).
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
from deploy.local.servers.watchdog import Watchdog
from deploy.local.supervisor import RUNNING, STARTING, Part, Supervisor
from deploy.setup import reach_store, set_up
from shared.aio import end
from shared.errors import ConfigError
from shared.settings import Settings

_GATEWAY_SECONDS = 60.0  # until the gateway has to be ready
_WORKERS_SECONDS = 120.0  # importing torch from a cold disk alone takes half a minute
_LOG_SECONDS = 5.0  # between two checks of the logs' sizes
_WRONG_SETTING = 2  # exit code of a service (shared.entrypoint)


@dataclass(frozen=True)
class Service:
    """A service of this project and its command."""

    name: str
    role: Role  # its user in the embedded NATS server
    command: tuple[str, ...]
    grace: float = 15.0  # seconds from SIGTERM to SIGKILL, in which a worker returns its song to the queue

    @classmethod
    def module(cls, name: str, role: Role, module: str) -> "Service":
        """Make a service that runs a Python module."""
        return cls(name, role, (sys.executable, "-m", module))


GATEWAY = Service.module("gateway", "gateway", "services.gateway")
WORKERS = (
    Service.module("codec worker", "codec", "services.codec_worker"),
    Service.module("tokenizer worker", "tokenizer", "services.tokenizer_worker"),
)


def _say(sentence: str) -> None:
    print(sentence, flush=True)


async def _prepare(settings: Settings) -> None:
    """Wait for the servers that these settings name, and create the missing streams and the bucket in them."""
    waiting = [asyncio.ensure_future(set_up(settings, say=_say))] if settings.nats_url else []
    if settings.s3_endpoint:
        waiting.append(asyncio.ensure_future(reach_store(settings, say=_say)))
    try:
        await asyncio.gather(*waiting)
    finally:
        await end(*waiting)


class Stack:
    """The system that `make run` starts. `run` is called once, in the main thread."""

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
        """Start all parts, print ``ready: <url>``, and stop all parts on SIGINT, SIGTERM or SIGHUP.

        Raises `ConfigError` when a setting has to be changed, `StartFailed` when a part does not get ready, ends too
        often, or ends because of its settings.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under nohup, SIGHUP stays ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._interrupt)
        with _only_stack(self._settings.data_dir):
            starting = asyncio.create_task(self._start())
            starting.add_done_callback(self._ended)
            self._watch(self._rotate_logs())
            try:
                await self._outcome
            finally:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                await self._stop()

    async def restart(self, name: str) -> None:
        """Stop and start the part with this name ("nats", "s3", "gateway", …). The other parts see a short outage.

        Raises `KeyError` when there is no such part, `StartFailed` or `PortInUse` when the start fails, which is then
        retried as after an unexpected end.
        """
        parts = {supervisor.part.name: supervisor for supervisor in self._parts}
        await parts[name].restart()

    async def _start(self) -> None:
        settings = self._settings
        if not port_is_free(settings.port, settings.host):
            raise PortInUse(f"port {settings.port} for the gateway is in use: set HEARTMULA_PORT to another port")
        keep_ports([settings.port])
        await self._prepare(settings)  # the user's own servers, before the embedded ones are started
        servers: list[Server] = []
        nats_urls: dict[Role, str] = {}
        credentials = load_credentials(settings.data_dir)
        if not settings.nats_url:
            broker = NatsServer(settings.data_dir, settings.nats_port, credentials.nats_passwords)
            nats_urls = {role: broker.url_of(role) for role in ROLES}
            servers.append(broker)
        if not settings.s3_endpoint:
            reader = Reader(credentials.s3_reader_access_key, credentials.s3_reader_secret_key, settings.s3_bucket)
            store = S3Server(
                settings.data_dir, settings.s3_port, credentials.s3_access_key, credentials.s3_secret_key, reader=reader
            )
            self._environ["HEARTMULA_S3_ENDPOINT"] = store.url
            self._environ["HEARTMULA_S3_ACCESS_KEY"] = store.access_key
            self._environ["HEARTMULA_S3_SECRET_KEY"] = store.secret_key
            servers.append(store)
        if not settings.webhook_secret:
            self._environ["HEARTMULA_WEBHOOK_SECRET"] = credentials.webhook_secret
        for server in servers:
            await self._add(server)
        if servers:
            self._watch(Watchdog(servers, settings.s3_bucket, self.restart).run())
        if nats_urls:
            await self._prepare(replace(settings, nats_url=nats_urls["bootstrap"], s3_endpoint=""))
        await self._add(self._service(self._gateway, nats_urls, {}), {_WRONG_SETTING})
        await self._until("/livez", "the gateway", _GATEWAY_SECONDS)
        threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())}
        for worker in self._workers:
            await self._add(self._service(worker, nats_urls, threads), {_WRONG_SETTING})
        # Without workers /health answers 200 too, because songs can wait for them: its body has the status.
        await self._until("/health", "the workers", _WORKERS_SECONDS, body='"status":"ok"')
        for supervisor in self._parts:
            supervisor.policy = RUNNING
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

    async def _rotate_logs(self) -> NoReturn:
        while True:
            for supervisor in self._parts:
                supervisor.part.rotate_log()
            await asyncio.sleep(_LOG_SECONDS)

    async def _until(self, path: str, part: str, seconds: float, body: str = "") -> None:
        deadline = time.monotonic() + seconds
        answer = (0, "")
        while answer[0] != 200 or body not in answer[1]:
            if time.monotonic() > deadline:
                last = f": GET {path} answers {answer[0]} {answer[1]}" if answer[0] else ""
                raise StartFailed(f"{part} did not get ready within {seconds:g} s{last}")
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
        if self._outcome.done():  # the second signal: kill instead of waiting
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
    """Hold the data folder's lock, which the kernel releases however this process ends. Raises `ConfigError`."""
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
