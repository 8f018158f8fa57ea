"""S3 servers of others, as the object store of this service."""

from abc import abstractmethod
from pathlib import Path

import urllib3
from minio import Minio
from minio.error import MinioException

from deploy.local.process import Process
from deploy.local.servers.base import Server
from deploy.local.servers.embedded import free_port
from tests.real.commands import PATH, found


class OtherStore(Server):
    """A server of S3 on the loopback interface, with a user who has all rights."""

    name = "store"
    variable = "nothing: another process took it"
    program: str
    access_key, secret_key = "heartmula", "heartmula-secret"

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir / "objects"
        self.folder.mkdir()
        super().__init__(data_dir, free_port())

    @classmethod
    def found(cls) -> str | None:
        """The path of its program, if it is on the PATH."""
        return found(cls.program)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    @abstractmethod
    def command(self) -> tuple[str, ...]:
        """Arguments of the program."""

    @property
    @abstractmethod
    def variables(self) -> dict[str, str]:
        """Its environment."""

    def _process(self) -> Process:
        environment = {"PATH": PATH, "HOME": str(self.data_dir)} | self.variables
        log = self.data_dir / "logs" / "store.log"
        return Process(
            self.name, (self.found() or self.program, *self.command), env=environment, cwd=self.data_dir, log=log
        )

    def _ports(self) -> list[int]:
        return [self.port]

    def _prepare(self) -> None:
        """Nothing: it is configured by its arguments."""

    async def _answers(self) -> bool:
        pool = urllib3.PoolManager(timeout=2, retries=False)
        client = Minio(
            endpoint=f"127.0.0.1:{self.port}",
            access_key=self.access_key,
            secret_key=self.secret_key,
            secure=False,
            region="us-east-1",
            http_client=pool,
        )
        try:
            client.list_buckets()
        except (MinioException, urllib3.exceptions.HTTPError):
            return False
        return True


class Versity(OtherStore):
    """Versity's gateway: objects are files of a folder."""

    program = "versitygw"

    @property
    def command(self) -> tuple[str, ...]:
        return "--port", f"127.0.0.1:{self.port}", "posix", str(self.folder)

    @property
    def variables(self) -> dict[str, str]:
        return {"ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key}


class MinioServer(OtherStore):
    """MinIO on one disk."""

    program = "minio"

    @property
    def command(self) -> tuple[str, ...]:
        console = f"127.0.0.1:{free_port()}"
        return "server", "--address", f"127.0.0.1:{self.port}", "--console-address", console, str(self.folder)

    @property
    def variables(self) -> dict[str, str]:
        return {"MINIO_ROOT_USER": self.access_key, "MINIO_ROOT_PASSWORD": self.secret_key}


class SeaweedFS(OtherStore):
    """SeaweedFS as it comes, without what the embedded one is configured with."""

    program = "weed"

    def _ports(self) -> list[int]:
        return [self.port + offset for offset in (*range(10), 10_008)]

    @property
    def command(self) -> tuple[str, ...]:
        parts = ("s3", "master", "volume", "filer")
        options = [f"{part}.port{grpc}" for part in parts for grpc in ("", ".grpc")] + ["admin.port"]
        ports = [f"-{option}={self.port + offset}" for offset, option in enumerate(options)]
        return "mini", "-dir=objects", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports, "-webdav=false"

    @property
    def variables(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}


STORES: tuple[type[OtherStore], ...] = (Versity, MinioServer, SeaweedFS)
