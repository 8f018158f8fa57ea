"""Small volumes that can be filled, for tests of full disks."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.local.servers.embedded import ROLES, NatsServer, S3Server, free_port
from shared.errors import Unavailable
from shared.settings import Settings
from shared.storage.objects import ObjectStore


class Volume:
    """A file system that a test can fill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Write until no byte is free."""
        file = os.open(self._ballast, os.O_CREAT | os.O_WRONLY)
        try:
            while True:
                os.write(file, bytes(65536))
        except OSError:  # there is no space left on the device
            pass
        finally:
            os.close(file)

    def make_room(self) -> None:
        """Delete what `fill` wrote."""
        self._ballast.unlink()


class CannotMount(Exception):
    """This process may not mount a file system."""


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[Volume]:
    """Mount a tmpfs at a folder. Raises `CannotMount`."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}M", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        raise CannotMount("needs root, and the right to mount a tmpfs")
    try:
        yield Volume(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def volume(folder: Path, megabytes: int) -> Iterator[Volume]:
    """Mount a volume for a test, which is skipped if this process may not mount one."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(mounted(folder, megabytes))
        except CannotMount as reason:
            pytest.skip(str(reason))
        yield found


@asynccontextmanager
async def nats_on(disk: Volume, settings: Settings) -> AsyncIterator[tuple[NatsServer, Settings]]:
    """Start NATS on a volume; yields the server and settings that name it."""
    server = NatsServer(disk.folder, free_port(), dict.fromkeys(ROLES, "secret"))
    await server.start()
    try:
        yield server, replace(settings, nats_url=server.url)
    finally:
        await server.stop()


@asynccontextmanager
async def store_on(disk: Volume, settings: Settings) -> AsyncIterator[tuple[S3Server, Settings]]:
    """Start an object store on a volume; yields the server and settings that name it."""
    server = S3Server(disk.folder, free_port(S3Server.ports), "tester", "secretsecret")
    await server.start()
    try:
        yield server, replace(settings, s3_endpoint=server.url)
    finally:
        await server.stop()


async def break_store(store: ObjectStore, disk: Volume) -> None:
    """Fill the disk, and delete objects until one of the store's databases has failed to write."""
    for number in range(300):
        await store.put(f"audio/{number}/1.flac", b"x")
    disk.fill()
    for number in range(300):
        try:
            async with asyncio.timeout(2):
                await store.delete_one(f"audio/{number}/1.flac")
        except (Unavailable, TimeoutError):
            return
    raise AssertionError("the store deletes without room")
