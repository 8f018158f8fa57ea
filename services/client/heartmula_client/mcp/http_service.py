"""The service over HTTP, for a server on the user's machine."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, BinaryIO, cast

import httpx

from heartmula_client.client import AsyncClient
from heartmula_client.errors import ClientError
from heartmula_client.recordings import title_of
from heartmula_client.responses import Accepted, Event, Recording, Song, Songs

_MOST_BYTES = 1 << 30  # of a file that is fetched; the service has a limit of its own
_IN_MEMORY = 1 << 20
_FETCH_SECONDS = 600.0  # for the whole of it


class HttpSongService:
    """A `SongService` over the client."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @property
    def url(self) -> str:
        """See `SongService`, as all methods here."""
        return self._client.url

    async def write(self, request: Mapping[str, object], key: str | None) -> Accepted:
        """Request songs."""
        return await self._client.generate(**cast("dict[str, Any]", request), key=key)

    async def song(self, job_id: str) -> Song:
        """Read a song."""
        return await self._client.song(job_id)

    async def songs(self, limit: int, cursor: str | None, status: str | None, parent: str | None) -> Songs:
        """Read a page of songs."""
        return await self._client.songs(limit, cursor, cast("Any", status), parent)

    async def cancel(self, job_id: str) -> str:
        """Cancel a song."""
        return await self._client.cancel(job_id)

    async def follow(self, job_id: str, on_event: Callable[[Event], Awaitable[None]]) -> None:
        """Follow a song."""
        async with aclosing(self._client.watch(job_id)) as events:
            async for event in events:
                await on_event(event)

    async def upload(self, source: str, title: str | None) -> Recording:
        """Upload a file, or what is at an address."""
        if "://" not in source:
            file = _file(source)
            try:
                return await self._client.upload(file, title=title_of(file) if title is None else title)
            except OSError as error:
                raise ClientError(f"cannot be read: {error.strerror or error}", field="source") from error
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as fetched:
            try:
                async with asyncio.timeout(_FETCH_SECONDS):
                    await _fetch(source, cast("BinaryIO", fetched))
            except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
                why = str(error) or "it takes too long"
                raise ClientError(f"cannot be fetched: {why}", field="source") from error
            fetched.seek(0)
            return await self._client.upload(cast("BinaryIO", fetched), title=title)

    async def recording(self, recording_id: str) -> Recording:
        """Read a recording."""
        return await self._client.recording(recording_id)


def _file(path: str) -> Path:
    return Path(path).expanduser()


async def _fetch(url: str, file: BinaryIO) -> None:
    async with (
        httpx.AsyncClient(follow_redirects=True, timeout=httpx.Timeout(30, connect=10)) as http,
        http.stream("GET", url) as answer,
    ):
        answer.raise_for_status()
        size = 0
        async for block in answer.aiter_bytes():
            size += len(block)
            if size > _MOST_BYTES:
                raise ClientError(f"has more than {_MOST_BYTES // 1_000_000} MB", field="source")
            await asyncio.to_thread(file.write, block)
