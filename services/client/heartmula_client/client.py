"""HTTP client of the service with a method for each route. It repeats requests whose answer was lost."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import websockets

from heartmula_client.connection import read
from heartmula_client.download import MAX_HEADER, fetch, put_header
from heartmula_client.errors import ServiceFault, Unreachable
from heartmula_client.recordings import RecordingsClient
from heartmula_client.responses import (
    Accepted,
    Devices,
    Event,
    Health,
    Song,
    Songs,
    Tree,
    read_frame,
    same_state,
    snapshot_of,
)
from heartmula_client.retries import AWAY, INTERVAL
from heartmula_client.schema import AudioFormat, ContinueFrom, Priority, Status, WebhookEvent
from heartmula_client.stream import AudioStream

log = logging.getLogger(__name__)

_SOCKET_ERRORS = (OSError, TimeoutError, websockets.WebSocketException, msgspec.MsgspecError, UnicodeDecodeError)


class AsyncClient(RecordingsClient):
    """Client of the service at `url`, used in ``async with`` or closed with `aclose`.

    Every method raises a `ClientError`: `Unreachable`, `UnexpectedAnswer`, `Refused` or `ServiceFault`. After a lost
    connection and after answers 502, 503 and 504, it first makes up to three more attempts, each after the time that
    the service asks for.
    """

    async def generate(
        self,
        lyrics: str,
        tags: str = "",
        *,
        max_duration_ms: int | None = None,
        temperature: float | None = None,
        cfg_scale: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
        format: AudioFormat | None = None,  # noqa: A002, the name in the API
        title: str | None = None,
        priority: Priority | None = None,
        variants: int | None = None,
        webhook_url: str | None = None,
        webhook_events: Sequence[WebhookEvent] | None = None,
        continue_from: ContinueFrom | None = None,
        min_new_ms: int | None = None,
        instrumental: bool | None = None,
        not_before: datetime | None = None,
        key: str | None = None,
    ) -> Accepted:
        """Request a song. The service chooses what is None.

        `continue_from` begins it with another song or a recording, up to a moment of it; `lyrics` and `max_duration_ms`
        are those of the whole song then, and the model cannot end it before `min_new_ms` of it are new.
        An `instrumental` song has no words: `lyrics` are empty or section marks alone. The song is queued at once, or
        at the time `not_before`, which has a time zone and is at most six days ahead.
        `key` is the Idempotency-Key: repeating a request with its key returns the same song. Without `key` a new one
        is made for each call, so that a request that is repeated because its answer was lost makes no second song.
        """
        fields = {
            "lyrics": lyrics,
            "tags": tags,
            "max_duration_ms": max_duration_ms,
            "temperature": temperature,
            "cfg_scale": cfg_scale,
            "topk": topk,
            "seed": seed,
            "format": format,
            "title": title,
            "priority": priority,
            "variants": variants,
            "webhook_url": webhook_url,
            "webhook_events": webhook_events,
            "continue_from": continue_from,
            "min_new_ms": min_new_ms,
            "instrumental": instrumental,
            "not_before": not_before,
        }
        body = msgspec.json.encode({name: value for name, value in fields.items() if value is not None})
        headers = {"Content-Type": "application/json", "Idempotency-Key": key or str(uuid.uuid4())}
        return read(await self._send("POST", "/generate", content=body, headers=headers), Accepted)

    async def status(self, job_id: str) -> Song:
        """Return the state of a song."""
        return read(await self._send("GET", f"{_path(job_id)}/status"), Song)

    async def song(self, job_id: str) -> Song:
        """Return the state of a song with its request, the song that it goes on from, and those that go on from it."""
        return read(await self._send("GET", _path(job_id)), Song)

    async def tree(self, job_id: str) -> Tree:
        """Return all songs that a song is connected with by going on from one another, itself included."""
        return read(await self._send("GET", f"{_path(job_id)}/tree"), Tree)

    async def songs(
        self,
        limit: int | None = None,
        cursor: str | None = None,
        status: Status | None = None,
        parent: str | None = None,
    ) -> Songs:
        """Return a page of the list of songs; `cursor` is the `next` of the previous page.

        Of all songs, or of those in one state, or of those that go on from `parent`.
        """
        query = {"limit": limit, "cursor": cursor, "status": status, "parent": parent}
        params = {name: value for name, value in query.items() if value is not None}
        return read(await self._send("GET", "/generate", params=params), Songs)

    async def cancel(self, job_id: str) -> str:
        """Cancel a waiting or running song; returns its status."""
        answer = read(await self._send("DELETE", _path(job_id)), dict[str, Any])
        return str(answer.get("status", "cancelled"))

    async def forget(self, job_id: str) -> None:
        """Delete a song that has ended, and its audio."""
        await self._send("DELETE", _path(job_id), params={"forget": "true"})

    async def gpus(self) -> Devices:
        """Return the devices and the workers on them."""
        return read(await self._send("GET", "/api/gpu"), Devices)

    async def health(self) -> Health:
        """Return the health of the service. An unhealthy one raises nothing."""
        return read(await self._send("GET", "/health", accept=503), Health)

    async def download(
        self,
        job_id: str,
        path: Path | None = None,
        *,
        format: AudioFormat | None = None,  # noqa: A002, the name in the API
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Save the audio of a completed song, converted to `format` if given; returns the file.

        `fetch` describes `path` and which downloads are resumed.
        """
        url = f"{_path(job_id)}/result" + (f"?format={format}" if format else "")
        return await fetch(self._http, url, job_id, path, on_progress)

    async def stream(
        self,
        job_id: str,
        *,
        format: AudioFormat | None = None,  # noqa: A002, the name in the API
        start: float = 0.0,
        on_name: Callable[[str | None], None] | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the audio of a song as it grows: FLAC or `format`, from its beginning or from `start` seconds.

        Waits, without a limit, for a song that cannot be heard yet, and resumes a lost connection at the byte where it
        was. Ends when all of a completed song has been yielded; raises `SongIncomplete` when all has been yielded of a
        song that failed or was cancelled. `on_name` is called before the first bytes, with the service's name for the
        file, or None.
        """
        params = {"format": format, "from": f"{start:.3f}" if start else None}
        wanted = {name: value for name, value in params.items() if value is not None}
        audio = AudioStream(self._http, f"{_path(job_id)}/stream", wanted, lambda: self.status(job_id))
        begun = False
        async with aclosing(aiter(audio)) as blocks:
            async for block in blocks:
                if on_name and not begun:
                    on_name(audio.file_name)
                begun = True
                yield block

    async def finish_file(self, job_id: str, path: Path, *, format: AudioFormat | None = None) -> bool:  # noqa: A002
        """Complete a file that holds all that `stream` yielded of a completed song from its beginning.

        A stream begins before its length is known; this gives the file the header of the finished song, so that it
        equals a downloaded one. Returns False, and changes nothing, where the service's file is of another size.
        """
        headers = {"Range": f"bytes=0-{MAX_HEADER - 1}", "Accept-Encoding": "identity"}
        params = {"format": format} if format else {}
        return put_header(await self._send("GET", f"{_path(job_id)}/stream", params=params, headers=headers), path)

    async def watch(self, job_id: str) -> AsyncGenerator[Event, None]:
        """Yield the state of a song, then each of its events once, up to its end.

        A lost connection is resumed after the latest event. Where a websocket cannot be opened, the state is polled
        once a second instead.
        """
        latest: Event | None = None  # the latest that was yielded
        last_id: str | None = None  # id of the latest event of the stream
        answered: float | None = None  # when the service last answered, monotonic seconds
        while True:
            state: Event | None = None
            try:
                async with websockets.connect(
                    self._socket_url(job_id, last_id),
                    additional_headers=self._headers,
                    proxy=True if self._use_proxy else None,
                    max_size=None,
                ) as socket:
                    async for frame in socket:
                        event, answered = read_frame(frame), time.monotonic()
                        if event.kind == "snapshot":
                            state = event
                            if last_id is not None:  # the missed events follow
                                continue
                        last_id, latest = event.id, event
                        yield event
                        if event.ended:
                            return
            except _SOCKET_ERRORS as error:
                log.debug("%s: no live events: %r", job_id, error)
            if state is None:
                try:
                    state = snapshot_of(await self.status(job_id))
                    answered = time.monotonic()
                except (Unreachable, ServiceFault):
                    if answered is None or time.monotonic() - answered > AWAY:
                        raise
                else:
                    if not state.ended and not same_state(state, latest):
                        latest = state
                        yield state
            if state is not None and state.ended:  # and the event was missed
                yield state
                return
            await asyncio.sleep(INTERVAL)

    def _socket_url(self, job_id: str, after: str | None) -> str:
        url = f"ws{self.url.removeprefix('http')}{_path(job_id)}/events"
        return url if after is None else f"{url}?after={quote(after, safe='')}"


def _path(job_id: str) -> str:
    return f"/generate/{quote(job_id, safe='')}"
