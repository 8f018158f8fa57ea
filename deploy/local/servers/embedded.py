"""Embedded NATS and S3 servers for the local stack and for tests, which are the servers used in production.

::

    async with nats_server(folder, free_port(), dict.fromkeys(ROLES, "password")) as server:
        await nats.connect(server.url)
        server.kill()             # SIGKILL
        await server.start()      # same folder, same port

Both keep their files below one folder (``nats/``, ``s3/``, ``logs/``), so they can share it.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from deploy.local.servers.base import PortInUse, Server, StartFailed
from deploy.local.servers.nats import ROLES, NatsServer, Role
from deploy.local.servers.ports import free_port, port_is_free
from deploy.local.servers.seaweedfs import Reader, S3Server

__all__ = [
    "ROLES",
    "NatsServer",
    "PortInUse",
    "Reader",
    "Role",
    "S3Server",
    "Server",
    "StartFailed",
    "free_port",
    "nats_server",
    "port_is_free",
    "s3_server",
]


@asynccontextmanager
async def nats_server(data_dir: Path, port: int, passwords: Mapping[Role, str]) -> AsyncIterator[NatsServer]:
    """Run a `NatsServer`: ready on entry, stopped on exit."""
    server = NatsServer(data_dir, port, passwords)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def s3_server(data_dir: Path, port: int, access_key: str, secret_key: str) -> AsyncIterator[S3Server]:
    """Run an `S3Server`: ready on entry, stopped on exit."""
    server = S3Server(data_dir, port, access_key, secret_key)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
