"""Finished audio and its peaks: streamed from the object store, block by block, with ranges for browsers to seek."""

import asyncio
import contextlib
import logging
import unicodedata
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args
from urllib.parse import quote

from litestar.types import Receive, Scope, Send

from services.gateway.api.conditional import ByteRange, NotSatisfiable, parse_range, tag_matches
from services.gateway.container import Gateway
from services.gateway.errors import ApiError
from shared.audio.files import CONTENT_TYPES
from shared.audio.peaks import CONTENT_TYPE as PEAKS_TYPE
from shared.errors import HeartMulaError, ObjectError
from shared.schema.job import Job
from shared.schema.request import AudioFormat
from shared.storage.objects import ObjectReader, ObjectStore

log = logging.getLogger(__name__)

_STALLED_SECONDS = 300.0  # a player that is paused reads nothing for a while


async def audio_answer(
    gateway: Gateway, job: Job, method: str, headers: Mapping[str, str], wanted: str | None = None
) -> "AudioAnswer":
    """What to answer to a request for a song's audio, in the `wanted` format or as it was made.

    Raises `ApiError` where there is none. Takes the time of a conversion where nobody wanted it in this format before.
    """
    if wanted is not None and wanted not in get_args(AudioFormat):
        known = ", ".join(get_args(AudioFormat))
        raise ApiError(422, "invalid-request", f"format has to be one of {known}", field="format")
    form = cast("AudioFormat", wanted or job.request.format)
    key = await _audio_key(gateway, job)
    if form != job.request.format:
        key = await _made(gateway.renditions.converted(job, key, form))
    kind = {"Content-Type": CONTENT_TYPES[form], "Content-Disposition": disposition(job, form)}
    return await _answer(gateway, key, kind, method, headers)


async def peaks_answer(gateway: Gateway, job: Job, method: str, headers: Mapping[str, str]) -> "AudioAnswer":
    """The same for a song's peaks, as `shared.audio.peaks.PeaksBody`."""
    key = await _made(gateway.renditions.peaks(job, await _audio_key(gateway, job)))
    return await _answer(gateway, key, {"Content-Type": PEAKS_TYPE}, method, headers)


async def _made(making: Coroutine[Any, Any, str]) -> str:
    try:
        return await making
    except ObjectError as error:
        raise ApiError(410, "no-audio", str(error)) from None


async def _answer(
    gateway: Gateway, key: str, kind: dict[str, str], method: str, headers: Mapping[str, str]
) -> "AudioAnswer":
    try:
        stat = await gateway.store.stat(key)
    except ObjectError:
        raise _expired() from None
    etag = '"{}"'.format(stat.etag.strip('"'))
    common = kind | {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",  # keep it, but ask: a song can be deleted
    }

    def answer(status: int, more: dict[str, str], part: ByteRange | None) -> AudioAnswer:
        return AudioAnswer(gateway.store, gateway.spawn, key, status, common | more, part)

    if tag_matches(headers.get("if-none-match", ""), etag):
        return answer(304, {}, None)
    part = None
    # Ranges mean something to GET alone; If-Range needs the very same tag, and a date proves nothing here.
    if method == "GET" and headers.get("if-range", etag).strip() == etag:
        try:
            part = parse_range(headers.get("range", ""), stat.size)
        except NotSatisfiable:
            detail = f"there are {stat.size} bytes; ask for a range within them"
            bounds = {"Content-Range": f"bytes */{stat.size}", "Accept-Ranges": "bytes"}
            raise ApiError(416, "range-not-satisfiable", detail, headers=bounds) from None
    if part is not None:
        bounds = {
            "Content-Range": f"bytes {part.first}-{part.last}/{stat.size}",
            "Content-Length": str(part.length),
        }
        return answer(206, bounds, part)
    whole = ByteRange(0, stat.size - 1) if method == "GET" and stat.size else None
    return answer(200, {"Content-Length": str(stat.size)}, whole)


async def _audio_key(gateway: Gateway, job: Job) -> str:
    """The key of the audio as it was made; it is there. Raises `ApiError`."""
    match job.status:
        case "completed":
            with contextlib.suppress(ObjectError):
                if job.audio_key:
                    await gateway.store.stat(job.audio_key)
                    return job.audio_key
            raise _expired()
        case "cancelled":
            raise ApiError(410, "no-audio", "the song was cancelled")
        case "failed":
            raise ApiError(410, "no-audio", f"the song failed: {job.error or 'the log of the worker says why'}")
    detail = f"the song is {job.status}; ask for its status until it is completed"
    raise ApiError(409, "not-ready", detail, headers={"Retry-After": "2"})


def _expired() -> ApiError:
    return ApiError(410, "no-audio", "the audio has expired or was deleted; make the song again with the same seed")


def disposition(job: Job, ending: AudioFormat) -> str:
    """Content-Disposition of a song in a format, with a name that is safe on every file system (RFC 6266)."""
    kept = (
        " " if c in '<>:"/\\|?*' or unicodedata.category(c)[0] in "CZ" else c for c in (job.request.title or "").strip()
    )
    stem = " ".join("".join(kept).split()).strip(". ")[:100] or job.job_id
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().strip() or job.job_id
    encoded = quote(f"{stem}.{ending}", safe="")
    return f"inline; filename=\"{ascii_stem.replace('%', '_')}.{ending}\"; filename*=UTF-8''{encoded}"


@dataclass(frozen=True)
class AudioAnswer:
    """An ASGI response that lets go of the store whenever, and however, the client leaves."""

    store: ObjectStore
    spawn: Callable[[Coroutine[Any, Any, None]], object]
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
            raise _expired() from None
        gone = asyncio.create_task(_until_gone(receive))
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
        except HeartMulaError as error:  # too late for a problem detail: the connection is cut, which tells as much
            log.warning("%s: broken off: %s", self.key, error)
        except TimeoutError:
            log.info("%s: given up, the client does not read", self.key)
        finally:
            gone.cancel()
            self.spawn(_let_go(reader, reading))

    async def _start(self, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next_block(reader: ObjectReader) -> bytes | None:
    return await anext(reader, None)


async def _let_go(reader: ObjectReader, reading: "asyncio.Task[bytes | None] | None") -> None:
    """Closing waits for the read that is under way in another thread, so it is not done on the event loop."""
    if reading is not None:
        with contextlib.suppress(HeartMulaError):
            await reading
    await asyncio.to_thread(reader.close)
