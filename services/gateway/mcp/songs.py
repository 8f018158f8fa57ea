"""The service behind the tools: this gateway's parts, for one caller."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar, cast

import msgspec

from heartmula_client.mcp import (
    Accepted,
    Event,
    Recording,
    Refused,
    ServiceFault,
    Song,
    Songs,
    UnknownRecording,
    UnknownSong,
    read_frame,
)
from services.gateway.api.parameters import parent_filter, title_of
from services.gateway.auth.api_keys import Caller
from services.gateway.errors import PROBLEMS, to_api_error
from services.gateway.events.stored_events import Frame
from services.gateway.mcp.parts import Parts
from services.gateway.recordings.storing import Stored
from services.gateway.recordings.uploads import UploadRequest
from services.gateway.songs.event_feed import EventsLost
from services.gateway.songs.index import place_of
from shared.schema.job import Status

_KINDS = {"unknown-job": UnknownSong, "unknown-recording": UnknownRecording}
_Answer = TypeVar("_Answer")


class GatewaySongService:
    """A `SongService` over the parts of this gateway; see there for the methods."""

    def __init__(self, parts: Parts, caller: Caller, url: str) -> None:
        """`url`: how the caller reaches this service."""
        self._parts, self._caller, self._url = parts, caller, url

    @property
    def url(self) -> str:
        """The address of the service."""
        return self._url

    async def write(self, request: Mapping[str, object], key: str | None) -> Accepted:
        """Request songs."""
        with self._refusals():
            body = msgspec.json.encode(request)
            return _as((await _apart(self._parts.submission.submit(self._caller, body, key))).body, Accepted)

    async def song(self, job_id: str) -> Song:
        """Read a song."""
        songs = self._parts.songs
        with self._refusals():
            return _as(await songs.describe_with_request(await songs.find(self._caller.tenant, job_id)), Song)

    async def songs(self, limit: int, cursor: str | None, status: str | None, parent: str | None) -> Songs:
        """Read a page of songs."""
        with self._refusals():
            after = None if cursor is None else place_of(cursor)
            state = cast("Status | None", status)
            page = await self._parts.songs.page(self._caller.tenant, limit, after, state, parent_filter(parent))
            return _as(page, Songs)

    async def cancel(self, job_id: str) -> str:
        """Cancel a song."""
        with self._refusals():
            return (await _apart(self._parts.canceller.cancel(self._caller.tenant, job_id))).status

    async def follow(self, job_id: str, on_event: Callable[[Event], Awaitable[None]]) -> None:
        """Follow a song."""

        async def deliver(frame: Frame) -> None:
            await on_event(read_frame(frame.data))

        with self._refusals():
            try:
                await self._parts.event_feeds.follow(self._caller.tenant, job_id, None, deliver)
            except EventsLost:  # also where this gateway is shut down
                return

    async def upload(self, source: str, title: str | None) -> Recording:
        """Fetch a recording from an address."""
        with self._refusals():
            self._parts.fetcher.check(source)
            stored = await _apart(self._fetch(source, title_of(title)))
            return _as(self._parts.recordings.describe_stored(stored.job), Recording)

    async def _fetch(self, source: str, title: str | None) -> Stored:
        async with aclosing(self._parts.fetcher.fetch(source)) as body:
            # Nothing is asked for before the upload has its place, so its size is not known.
            asked = UploadRequest(body=body, content_type="", content_length=None, title=title)
            return await self._parts.uploads.take(self._caller, asked)

    async def recording(self, recording_id: str) -> Recording:
        """Read a recording."""
        recordings = self._parts.recordings
        with self._refusals():
            return _as(await recordings.describe(await recordings.find(self._caller.tenant, recording_id)), Recording)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn errors of the gateway into those of the client, whose words the tools show."""
        try:
            yield
        except Exception as error:
            found = to_api_error(error, self._parts.outage.retry_after(error))
            kind = _KINDS.get(found.kind, Refused if found.status < 500 else ServiceFault)
            retry = found.headers.get("Retry-After")
            raise kind(
                found.detail,
                status=found.status,
                type=f"/problems/{found.kind}",
                title=PROBLEMS[found.kind].title,
                field=found.field or None,
                retry_after=float(retry) if retry else None,
            ) from error


async def _apart(work: Coroutine[Any, Any, _Answer]) -> _Answer:
    """Do something in a task of its own, which is cancelled once where the caller is.

    The callers here are cancelled by anyio, which does so again and again, and would disturb what then cleans up.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.cancel()
        raise


def _as(body: Any, kind: type[_Answer]) -> _Answer:
    """An answer of the API as the client reads it."""
    return msgspec.convert(msgspec.to_builtins(body), kind)
