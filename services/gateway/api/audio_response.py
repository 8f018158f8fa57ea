"""Responses with finished audio and peaks: streamed from the object store, with ranges for browsers to seek."""

import asyncio
import contextlib
import logging
import time
import unicodedata
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote

import msgspec
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp, Receive, Scope, Send

from services.gateway.api.conditional import ByteRange, Conditions, NotSatisfiable, parse_range, tag_matches, tag_of
from services.gateway.api.http_protocol import cut
from services.gateway.api.responses import retry_seconds, until_gone
from services.gateway.errors import ApiError, unknown_job
from services.gateway.media.renditions import Renditions
from services.gateway.tasks import BackgroundTasks
from shared.audio.forms import CONTENT_TYPES
from shared.audio.peaks import CONTENT_TYPE as PEAKS_TYPE
from shared.audio.peaks import PeaksBody
from shared.errors import HeartMulaError, ObjectError
from shared.jobs.store import JobStore
from shared.schema.base import timestamp
from shared.schema.job import Job
from shared.schema.request import AudioFormat
from shared.storage.keys import part_peaks_key
from shared.storage.objects import ObjectReader, ObjectStore

log = logging.getLogger(__name__)

EXPIRED = "the audio has expired or was deleted; make the song again with the same seed, or upload the recording again"
_STALLED_SECONDS = 300.0  # a player that is paused reads nothing for a while


class AudioResponses:
    """Answers requests for finished songs, and for the peaks of songs that are being made, from the object store."""

    def __init__(self, store: ObjectStore, jobs: JobStore, renditions: Renditions, tasks: BackgroundTasks) -> None:
        self._store, self._jobs, self._renditions, self._tasks = store, jobs, renditions, tasks

    async def audio(self, job: Job, wanted: AudioFormat | None, asked: Conditions) -> "AudioResponse":
        """A song's audio in the `wanted` format, or as it was made. Raises `ApiError` where there is none.

        Takes the time of a conversion where it was never asked for in this format before.
        """
        form = wanted or job.request.format
        key = await self._audio_key(job)
        if form != job.request.format:
            key = await _made(self._renditions.converted(job, key, form))
        kind = {"Content-Type": CONTENT_TYPES[form], "Content-Disposition": disposition(job, form)}
        return await self._respond(key, kind, asked)

    async def peaks(self, job: Job, asked: Conditions) -> ASGIApp:
        """A song's peaks, as `shared.audio.peaks.PeaksBody`: while it is made, those of what can be heard of it.

        Raises `ApiError` where there are none.
        """
        job, so_far = await self._peaks_so_far(job)
        if so_far is not None:
            return _bytes_response(so_far, asked)
        key = await _made(self._renditions.peaks(job, await self._audio_key(job)))
        return cast("ASGIApp", await self._respond(key, {"Content-Type": PEAKS_TYPE}, asked))

    async def waveform(self, job: Job) -> PeaksBody:
        """The peaks of a finished song, decoded. Raises `ApiError` where there are none, `ObjectError` if they go."""
        key = await _made(self._renditions.peaks(job, await self._audio_key(job)))
        return msgspec.json.decode(await self._store.get(key), type=PeaksBody)

    async def _peaks_so_far(self, job: Job) -> tuple[Job, bytes | None]:
        """The peaks of what can be heard of a song that is being made, None where there are none; and its record."""
        while job.decode is not None and job.decode.parts:
            last = job.decode.parts[-1].key
            with contextlib.suppress(ObjectError):
                return job, await self._store.get(part_peaks_key(last))
            # Gone with the next part, or with the end of the song: its record says which.
            now = await self._jobs.get(job.job_id, job.tenant)
            if now is None:
                raise unknown_job()
            if now.decode is not None and now.decode.parts and now.decode.parts[-1].key == last:
                break
            job = now
        return job, None

    async def _audio_key(self, job: Job) -> str:
        """The key of the audio as it was made, which exists. Raises `ApiError`."""
        if job.status in ("cancelled", "failed"):
            raise no_audio(job)
        if job.status == "completed" or job.recording is not None:  # whose audio is there from the beginning
            with contextlib.suppress(ObjectError):
                if job.audio_key:
                    await self._store.stat(job.audio_key)
                    return job.audio_key
            raise expired()
        raise not_ready(job, f"the song is {job.status}; ask for its status until it is completed")

    async def _respond(self, key: str, kind: dict[str, str], asked: Conditions) -> "AudioResponse":
        try:
            stat = await self._store.stat(key)
        except ObjectError:
            raise expired() from None
        etag = '"{}"'.format(stat.etag.strip('"'))
        common = kind | {
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, no-cache",  # keep it, but ask: a song can be deleted
        }

        def response(status: int, more: dict[str, str], part: ByteRange | None) -> AudioResponse:
            return AudioResponse(self._store, self._tasks, key, status, common | more, part)

        if tag_matches(asked.if_none_match or "", etag):
            return response(304, {}, None)
        part = requested_part(asked, stat.size, etag)
        if part is not None:
            bounds = {
                "Content-Range": f"bytes {part.first}-{part.last}/{stat.size}",
                "Content-Length": str(part.length),
            }
            return response(206, bounds, part)
        whole = ByteRange(0, stat.size - 1) if asked.method == "GET" and stat.size else None
        return response(200, {"Content-Length": str(stat.size)}, whole)


def requested_part(asked: Conditions, size: int, etag: str | None) -> ByteRange | None:
    """The part of audio of a known size that a client wants; None for all of it. Raises a 416 `ApiError`."""
    # A range has a meaning for GET only. If-Range needs this very tag: a date proves nothing here.
    if asked.method != "GET" or (asked.if_range is not None and asked.if_range.strip() != etag):
        return None
    try:
        return parse_range(asked.range or "", size)
    except NotSatisfiable:
        detail = f"there are {size} bytes; ask for a range within them"
        bounds = {"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"}
        raise ApiError(416, "range-not-satisfiable", detail, headers=bounds) from None


def _bytes_response(body: bytes, asked: Conditions) -> ASGIApp:
    """A response that is sent whole or not at all: what it holds grows with the song."""
    headers = {"ETag": tag_of(body), "Cache-Control": "private, no-cache"}
    if tag_matches(asked.if_none_match or "", headers["ETag"]):
        return ASGIResponse(status_code=304, headers=headers)
    headers |= {"Content-Type": PEAKS_TYPE, "Content-Length": str(len(body))}
    head = asked.method == "HEAD"
    return ASGIResponse(body=b"" if head else body, headers=headers, is_head_response=head)


async def _made(making: Coroutine[Any, Any, str]) -> str:
    try:
        return await making
    except ObjectError as error:
        raise ApiError(410, "no-audio", str(error)) from None


def not_ready(job: Job, detail: str) -> ApiError:
    """Build the 409 error for audio that there is none of yet. For a song for later, its time is the `detail`."""
    if job.deferred and job.not_before is not None and job.not_before > time.time():
        detail = f"the song waits until {timestamp(job.not_before)}, when it is queued; ask again after that"
    return ApiError(409, "not-ready", detail, headers={"Retry-After": str(retry_seconds(job, 2))})


def no_audio(job: Job) -> ApiError:
    """Build the 410 error for a song or recording that failed or was cancelled."""
    what = "song" if job.recording is None else "recording"
    if job.status == "cancelled":
        return ApiError(410, "no-audio", f"the {what} was cancelled")
    return ApiError(410, "no-audio", f"the {what} failed: {job.error or 'the log of the worker says why'}")


def expired() -> ApiError:
    """Build the 410 error for audio that is gone."""
    return ApiError(410, "no-audio", EXPIRED)


def disposition(job: Job, ending: str) -> str:
    """Content-Disposition of a song's file, with a name that is safe on every file system (RFC 6266)."""
    kept = (
        " " if c in '<>:"/\\|?*' or unicodedata.category(c)[0] in "CZ" else c for c in (job.request.title or "").strip()
    )
    stem = " ".join("".join(kept).split()).strip(". ")[:100] or job.job_id
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().strip() or job.job_id
    encoded = quote(f"{stem}.{ending}", safe="")
    return f"inline; filename=\"{ascii_stem.replace('%', '_')}.{ending}\"; filename*=UTF-8''{encoded}"


@dataclass(frozen=True)
class AudioResponse:
    """An ASGI response that releases its connection to the store as soon as the client leaves, in any way."""

    store: ObjectStore
    tasks: BackgroundTasks
    key: str
    status: int
    headers: dict[str, str]
    part: ByteRange | None  # None: no body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.part is None:
            await self._start(send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        try:
            reader = await self.store.open(self.key, self.part.first, self.part.length)
        except ObjectError:
            raise expired() from None
        gone = asyncio.create_task(until_gone(receive))
        reading: asyncio.Task[bytes | None] | None = None
        try:
            await self._start(send)
            while not gone.done():
                reading = asyncio.create_task(_next_block(reader))
                await asyncio.wait({reading, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                block = reading.result()
                async with asyncio.timeout(_STALLED_SECONDS):
                    await send({"type": "http.response.body", "body": block or b"", "more_body": block is not None})
                if block is None:
                    return
        except HeartMulaError as error:  # too late for a problem detail: the connection is cut instead
            log.warning("%s: broken off: %s", self.key, error)
            await cut(scope)
        except TimeoutError:
            log.info("%s: stopped, the client does not read", self.key)
            await cut(scope)
        finally:
            gone.cancel()
            self.tasks.spawn(_release(reader, reading))

    async def _start(self, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})


async def _next_block(reader: ObjectReader) -> bytes | None:
    return await anext(reader, None)


async def _release(reader: ObjectReader, reading: "asyncio.Task[bytes | None] | None") -> None:
    """Close the reader, in a thread: closing waits for the read that is under way in another one."""
    if reading is not None:
        with contextlib.suppress(HeartMulaError):
            await reading
    await asyncio.to_thread(reader.close)
