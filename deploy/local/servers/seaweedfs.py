"""Embedded S3 server (SeaweedFS)."""

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException

from deploy.local.private_file import write_private
from deploy.local.process import Process
from deploy.local.servers.base import Server, binary
from deploy.local.servers.seaweedfs_security import write_security
from shared.errors import ConfigError


@dataclass(frozen=True)
class Reader:
    """An S3 user who may read and list the objects under one prefix."""

    access_key: str
    secret_key: str
    bucket: str
    prefix: str = "audio/"

    @property
    def identity(self) -> dict[str, object]:
        """The user in the form of SeaweedFS's configuration."""
        return {
            "name": "reader",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": [f"{action}:{self.bucket}/{self.prefix}*" for action in ("Read", "List")],
        }


class S3Server(Server):
    """SeaweedFS in one process, with S3 on the loopback interface.

    One user has all rights. `reader` adds another one, who may only read and list finished songs.
    """

    name = "s3"
    variable = "HEARTMULA_S3_PORT"
    ports = (*range(10), 10_008)  # that it listens on, as offsets from its port

    def __init__(
        self,
        data_dir: Path,
        port: int,
        access_key: str,
        secret_key: str,
        metrics_port: int = 0,
        reader: Reader | None = None,
    ) -> None:
        """`metrics_port` serves metrics without credentials; 0 switches them off.

        Raises `ConfigError` for a `port` above 55527.
        """
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
        command = [  # -dir is a list separated by commas, so the folder's name must not be in it
            *(binary("weed"), "-logtostderr=true", "mini", "-dir=."),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-{name}={port}" for name, port in self._port_options().items()),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"),
            "-disableHttp",  # otherwise the filer's port reads and deletes any object without credentials
            "-volume.preStopSeconds=0",  # time for other machines to notice; there are none
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
            umask=0o077,  # its sockets are in /tmp
        )

    def _ports(self) -> list[int]:
        # There is no option for the last one. SeaweedFS's worker uses it, and without it no lifecycle rule runs.
        options = self._port_options()
        metrics = [self.metrics_port] if self.metrics_port else []
        return [*options.values(), options["admin.port"] + 10_000, *metrics]

    def _prepare(self) -> None:
        folder = self.data_dir / "s3"
        folder.mkdir(mode=0o700, exist_ok=True)
        write_security(folder)
        if self.reader:
            write_private(self.data_dir / "s3.json", json.dumps({"identities": [self.reader.identity]}))

    async def _answers(self) -> bool:
        return await asyncio.to_thread(self._serves)

    def _serves(self) -> bool:
        pool = urllib3.PoolManager(timeout=2.0, retries=False)
        ports, url = self._port_options(), urlsplit(self.url)
        try:
            # Volumes that meet a master which is not yet the leader register again after five seconds. Until then
            # objects can be neither read nor written, while everything else answers. The master's page lists the
            # registered volumes.
            page = pool.request("GET", f"http://127.0.0.1:{ports['master.port']}/")
            if page.status == 200 and f"127.0.0.1:{ports['volume.port']}".encode() not in page.data:
                return False
            Minio(
                url.netloc,
                self.access_key,
                self.secret_key,
                secure=url.scheme == "https",
                region="us-east-1",
                http_client=pool,
            ).list_buckets()
        except (MinioException, urllib3.exceptions.HTTPError):
            return False
        finally:
            pool.clear()
        return True

    def _clean(self) -> None:
        # SeaweedFS creates sockets there whatever its options, and leaves some even after SIGTERM.
        for port in self._ports():
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)
