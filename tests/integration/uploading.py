"""Uploads byte by byte, to a gateway in this process."""

import asyncio
import json
from pathlib import Path

from services.gateway.container import Container
from services.gateway.server import GatewayServer
from shared.nats.subjects import DEC
from tests.integration.gateway_fixtures import eventually
from tests.unit.recordings import file_of, music

DATA = file_of("flac", music(1.2))
Connected = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def head(size: object = len(DATA), *more: str) -> bytes:
    """The head of an upload."""
    lines = ("POST /recordings HTTP/1.1", "Host: localhost", f"Content-Length: {size}", *more)
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


class Gateway:
    """A gateway in this process, whose parts can be reached."""

    def __init__(self, parts: Container, server: GatewayServer, base: str) -> None:
        self.parts, self.server, self.base = parts, server, base

    async def connect(self, sent: bytes = b"") -> Connected:
        """Open a connection and send something on it."""
        host, _, port = self.base.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        return reader, writer

    async def answer(self, connected: Connected) -> tuple[int, str, dict[str, object]]:
        """Read the answer on a connection, and to its end; returns status, head and body."""
        text = await asyncio.wait_for(connected[0].read(), 30)
        connected[1].close()
        lines, _, body = text.partition(b"\r\n\r\n")
        return int(lines.split()[1]), lines.decode().lower(), json.loads(body)

    async def begun(self) -> None:
        """Return once an upload is being received."""

        async def found() -> bool:
            return bool(list(self.scratch.glob("*/upload")))

        await eventually(found, "no upload is being received")

    async def receiving(self) -> None:
        """Return once some of an upload is on the disk."""

        async def begun() -> bool:
            return any(path.stat().st_size for path in self.scratch.glob("*/upload"))

        await eventually(begun, "no upload is being received")

    @property
    def scratch(self) -> Path:
        """Where uploads are written to."""
        return self.parts.settings.data_dir / "tmp"

    async def nothing_left(self) -> None:
        """Return once no file, room, object, message or request of an upload is left."""
        room = self.parts.uploads._room

        async def gone() -> bool:
            return not (list(self.scratch.glob("*")) or room._reservations or self.server.server_state.tasks)

        await eventually(gone, "something is left")
        assert await self.parts.store.list("recordings/") == []
        assert (await self.parts.js.stream_info(DEC)).state.messages == 0
        assert (await self.parts.recordings.page("local", 9, None, None)).recordings == []
