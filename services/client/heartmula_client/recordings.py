"""The methods of the client for recordings: audio that users upload, for songs to go on from."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import httpx

from heartmula_client.connection import Connection, read
from heartmula_client.download import fetch
from heartmula_client.errors import ServiceFault, Unreachable
from heartmula_client.responses import Recording, Recordings
from heartmula_client.retries import AWAY, INTERVAL
from heartmula_client.schema import AudioFormat, RecordingStatus

_LONGEST_TITLE = 300  # characters
_BLOCK = 1 << 18  # bytes
# Seconds for the service to answer once it has all of an upload: it decodes it first, and others may be before it.
_PATIENCE = httpx.Timeout(30, connect=5, read=300)


def title_of(file: Path) -> str:
    """Return the title of a recording that is named after its file."""
    return "".join(filter(str.isprintable, file.stem))[:_LONGEST_TITLE]


class RecordingsClient(Connection):
    """A connection with the methods for recordings. Each raises a `ClientError`."""

    async def upload(
        self,
        source: Path | BinaryIO,
        *,
        title: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Recording:
        """Upload a recording: FLAC, WAV, MP3 or Ogg in a file, or in an open one from where that stands.

        It is queued then; `watch_recording` says when songs can go on from it. The same file again is the same
        recording, so an upload may be repeated. The file is never whole in memory. `on_progress` is called with the
        sent and the total bytes. Raises `OSError` where the file cannot be read.
        """
        with ExitStack() as stack:
            file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
            start = file.tell()
            size = file.seek(0, os.SEEK_END) - start
            answer = await self._send(
                "POST",
                "/recordings",
                params={} if title is None else {"title": title},
                headers={"Content-Type": "application/octet-stream", "Content-Length": str(size)},
                body=lambda: _blocks(file, start, size, on_progress),
                timeout=_PATIENCE,
            )
        return read(answer, Recording)

    async def recording(self, recording_id: str) -> Recording:
        """Return the state of a recording."""
        return read(await self._send("GET", _path(recording_id)), Recording)

    async def recordings(
        self, limit: int | None = None, cursor: str | None = None, status: RecordingStatus | None = None
    ) -> Recordings:
        """Return a page of the list of recordings; `cursor` is the `next` of the previous page.

        Of all recordings, or of those in one state.
        """
        query = {"limit": limit, "cursor": cursor, "status": status}
        params = {name: value for name, value in query.items() if value is not None}
        return read(await self._send("GET", "/recordings", params=params), Recordings)

    async def watch_recording(self, recording_id: str) -> AsyncGenerator[Recording, None]:
        """Yield the state of a recording, then each new one, up to its end: it is ready, or failed.

        The state is polled once a second. A service that has answered may be away for a while.
        """
        latest: Recording | None = None
        answered: float | None = None  # when the service last answered, monotonic seconds
        while True:
            try:
                found = await self.recording(recording_id)
            except (Unreachable, ServiceFault):
                if answered is None or time.monotonic() - answered > AWAY:
                    raise
            else:
                answered = time.monotonic()
                if found != latest:
                    latest = found
                    yield found
                if found.ended:
                    return
            await asyncio.sleep(INTERVAL)

    async def delete_recording(self, recording_id: str) -> None:
        """Delete a recording, also while it is encoded. Songs that go on from it stay whole."""
        await self._send("DELETE", _path(recording_id))

    async def download_recording(
        self,
        recording_id: str,
        path: Path | None = None,
        *,
        format: AudioFormat | None = None,  # noqa: A002, the name in the API
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Save the audio of a recording, FLAC or converted to `format`; returns the file.

        `fetch` describes `path` and which downloads are resumed.
        """
        url = f"{_path(recording_id)}/audio" + (f"?format={format}" if format else "")
        return await fetch(self._http, url, recording_id, path, on_progress)


def _path(recording_id: str) -> str:
    return f"/recordings/{quote(recording_id, safe='')}"


async def _blocks(
    file: BinaryIO, start: int, size: int, on_progress: Callable[[int, int], None] | None
) -> AsyncIterator[bytes]:
    """Yield `size` bytes of a file from `start` on."""
    file.seek(start)
    sent = 0
    while block := await asyncio.to_thread(file.read, min(_BLOCK, size - sent)):
        yield block
        sent += len(block)
        if on_progress:
            on_progress(sent, size)
