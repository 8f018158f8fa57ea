"""A service with songs that grow when a test says so, and connections that go wrong as they are scripted."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from heartmula_client import AsyncClient


@dataclass
class Connection:
    """What happens to one connection of a listener. By itself it follows the song to its end."""

    status: int = 200  # of the answer; 400 and above is one without audio
    headers: dict[str, str] = field(default_factory=dict)  # besides
    cut: int | None = None  # bytes after which it breaks off
    end: int | None = None  # bytes after which it ends cleanly
    framing: Literal["chunked", "close"] = "chunked"  # of a song that grows
    ignores_range: bool = False
    begin: int | None = None  # where the answer says that it begins
    silent: bool = False  # nothing comes after the headers


@dataclass
class Song:
    """A song and how far it is."""

    audio: bytes  # all of it, as it is streamed
    finished: bytes = b""  # the file, where it differs
    made: int = 0  # bytes that there are
    status: str = "generating"
    error: str | None = None
    title: str | None = None
    playable_seconds: float | None = None  # None: as a service that has no streams answers
    connections: list[Connection] = field(default_factory=list)  # of the next listeners, in order
    ranges: list[str] = field(default_factory=list)  # that were asked for
    queries: list[dict[str, list[str]]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        """Whether it grows no more."""
        return self.status in ("completed", "failed", "cancelled")

    def grow(self, to: int | None = None, status: str | None = None) -> None:
        """Let there be more of it; and let it end."""
        self.made = len(self.audio) if to is None else to
        self.status = status or self.status
        self.changed.set()
        self.changed = asyncio.Event()

    def state(self, job_id: str) -> bytes:
        """Its status as the service answers it."""
        state = {"job_id": job_id, "status": self.status, "error": self.error, "title": self.title}
        heard = {} if self.playable_seconds is None else {"playable_seconds": self.playable_seconds}
        return json.dumps(state | heard).encode()


class Service:
    """An HTTP server with songs. It has no websockets, so that clients ask for the status."""

    def __init__(self, **songs: Song) -> None:
        self.songs = songs
        self.url = ""
        self.requested: list[dict[str, Any]] = []  # bodies of POST /generate, which starts the songs of `accepted`
        self.accepted: list[str] = []
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Service"]:
        """Listen for connections."""
        await self.start()
        try:
            yield self
        finally:
            await self.stop()

    async def start(self) -> None:
        """Listen, again on the port of the first time."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", urlsplit(self.url).port or 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Cut all connections and listen no more."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        """Create a client of this service, which listens meanwhile."""
        async with self.serve(), AsyncClient(self.url) as client:
            yield client

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            await self._answer(head, await reader.readexactly(int(length[1]) if length else 0), writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        method, target, _ = head.split("\r\n")[0].split()
        words = urlsplit(target).path.strip("/").split("/")
        song = self.songs.get(words[1] if len(words) > 1 else "")
        if method == "POST":
            self.requested.append(json.loads(body))
            links = {"status_url": "", "result_url": "", "events_url": ""}
            ids = [{"job_id": name, "status": "queued"} | links for name in self.accepted]
            _write(writer, 202, {}, json.dumps(ids[0] | {"variants": ids[1:] and ids}).encode())
        elif song is None:
            _write(writer, 404, {}, b'{"type": "/problems/unknown-job", "detail": "no song has this id"}')
        elif words[-1] == "status":
            _write(writer, 200, {}, song.state(words[1]))
        elif words[-1] == "stream":
            asked = re.search(r"range: bytes=(\d+)-(\d*)", head, re.IGNORECASE)
            song.queries.append(parse_qs(urlsplit(target).query))
            song.ranges.append(asked[0].partition("=")[2] if asked else "")
            connection = song.connections.pop(0) if song.connections else Connection()
            await _listen(song, connection, asked, writer)
        else:
            _write(writer, 404, {}, b"{}")


async def _listen(
    song: Song, connection: Connection, asked: re.Match[str] | None, writer: asyncio.StreamWriter
) -> None:
    if connection.status >= 400:
        _write(writer, connection.status, connection.headers, b'{"detail": "as the test says"}')
        return
    if connection.ignores_range:
        asked = None
    first, last = int(asked[1]) if asked else 0, int(asked[2]) if asked and asked[2] else None
    headers = {"Content-Type": "audio/flac", "Content-Disposition": f'inline; filename="{song.title or 1}.flac"'}
    complete = song.status == "completed"
    audio = (song.finished if complete and song.finished else song.audio)[: None if last is None else last + 1]
    size = str(len(song.finished or song.audio)) if complete else "*"
    if asked:
        begin = first if connection.begin is None else connection.begin
        headers["Content-Range"] = f"bytes {begin}-{len(audio) - 1}/{size}"
    chunked = not complete and connection.framing == "chunked"
    if complete:
        headers["Content-Length"] = str(len(audio) - first)
    elif chunked:
        headers["Transfer-Encoding"] = "chunked"
    _head(writer, 206 if asked and connection.status == 200 else connection.status, headers | connection.headers)
    limit = connection.end if connection.cut is None else connection.cut
    sent = 0
    while True:
        changed = song.changed
        there = len(audio) if complete else song.made
        block = b"" if connection.silent else audio[first + sent : there]
        block = block if limit is None else block[: limit - sent]
        for start in range(0, len(block), 10_000):
            part = block[start : start + 10_000]
            writer.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            await writer.drain()
        sent += len(block)
        if sent == limit or (song.ended and first + sent >= there):
            break
        await changed.wait()
    if chunked and connection.cut is None:
        writer.write(b"0\r\n\r\n")


def _head(writer: asyncio.StreamWriter, status: int, headers: dict[str, str]) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"HTTP/1.1 {status} x\r\nConnection: close\r\n{lines}\r\n".encode())


def _write(writer: asyncio.StreamWriter, status: int, headers: dict[str, str], body: bytes) -> None:
    _head(writer, status, {"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers)
    writer.write(body)
