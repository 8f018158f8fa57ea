"""Three nats-servers in a cluster, each in a network namespace of its own, so that one can be cut off. Needs root."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import nats
import nats.errors
from nats.js.errors import APIError

from deploy.local.process import Process
from deploy.local.servers.base import binary
from deploy.local.servers.embedded import ROLES

CONFIG = Path(__file__).parents[2] / "deploy" / "nats"
PASSWORD = "secret"
SIZE = 3
_NET = "10.77.0."
_START_SECONDS = 60.0


class Node:
    """A nats-server of the cluster. Its link can be cut, its process killed and started again."""

    def __init__(self, folder: Path, tag: str, number: int) -> None:
        self.name = f"n{number}"
        self.folder = folder / self.name
        self.address = f"{_NET}{10 + number}"
        self.space, self.link = f"hm{tag}-{number}", f"hm{tag}v{number}"
        values = {"LISTEN": f"{self.address}:4222", "STORE": str(self.folder / "store")}
        values |= {f"{role.upper()}_PASSWORD": PASSWORD for role in ROLES}
        self.process = Process(
            self.name,
            ["ip", "netns", "exec", self.space, binary("nats-server"), "-c", str(self.folder / "node.conf")],
            env={"PATH": os.environ["PATH"]} | {f"NATS_{name}": json.dumps(value) for name, value in values.items()},
            log=self.folder / "nats.log",
        )

    @property
    def url(self) -> str:
        """URL for the role with all rights."""
        return f"nats://operator:{PASSWORD}@{self.address}:4222"

    async def prepare(self, bridge: str) -> None:
        """Create the node's namespace, its link and its configuration."""
        self.folder.mkdir(parents=True)
        for name in ("nats.conf", "roles.conf"):
            shutil.copy(CONFIG / name, self.folder)
        routes = ", ".join(f'"nats://{_NET}{10 + n}:6222"' for n in range(1, SIZE + 1))
        (self.folder / "node.conf").write_text(
            f'include "nats.conf"\nserver_name: {self.name}\n'
            f'cluster {{ name: songs, listen: "{self.address}:6222", routes: [{routes}] }}\n'
        )
        await ip("netns", "add", self.space)
        await ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        await ip("link", "set", self.link, "master", bridge, "up")
        await ip("-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        await ip("-n", self.space, "link", "set", "eth0", "up")
        await ip("-n", self.space, "link", "set", "lo", "up")

    async def cut(self, *, off: bool) -> None:
        """Cut the node's link, or restore it. Both sides keep their connections and receive nothing."""
        await ip("link", "set", self.link, "down" if off else "up")


async def ip(*words: str) -> None:
    """Run the command `ip`. Raises `CalledProcessError`."""
    process = await asyncio.create_subprocess_exec("ip", *words, stderr=subprocess.PIPE)
    _, said = await process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, ("ip", *words), stderr=said.decode())


@asynccontextmanager
async def open_cluster(folder: Path) -> AsyncIterator[list[Node]]:
    """A cluster of three nodes; nothing of them is left at the end."""
    tag = f"{os.getpid() % 100_000}"
    bridge = f"hm{tag}b"
    nodes = [Node(folder, tag, number) for number in range(1, SIZE + 1)]
    try:
        await ip("link", "add", bridge, "type", "bridge")
        await ip("addr", "add", f"{_NET}1/24", "dev", bridge)
        await ip("link", "set", bridge, "up")
        for node in nodes:
            await node.prepare(bridge)
            await node.process.start()
        async with asyncio.timeout(_START_SECONDS):
            while not await _ready(nodes):
                await asyncio.sleep(0.2)
        yield nodes
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):
                await node.process.stop()
            with suppress(subprocess.CalledProcessError):
                await ip("netns", "del", node.space)
        with suppress(subprocess.CalledProcessError):
            await ip("link", "del", bridge)


async def _ready(nodes: list[Node]) -> bool:
    for node in nodes:
        try:
            client = await nats.connect(node.url, allow_reconnect=False, connect_timeout=1, error_cb=_ignore)
        except (OSError, TimeoutError, nats.errors.Error):
            return False
        try:
            await client.jetstream(timeout=1).account_info()
        except (nats.errors.Error, APIError, TimeoutError):
            return False
        finally:
            await client.close()
    return True


async def _ignore(error: Exception) -> None:
    """Refused connections are expected while servers start."""
