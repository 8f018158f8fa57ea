"""Responses with the audio of songs that are being made: they begin before a song is complete, and end with it.

Ranges are those of RFC 9110 §14, and of RFC 8673 where the end is not known yet.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.api.audio_response import AudioResponses, disposition, expired, no_audio
from services.gateway.api.conditional import Conditions, parse_growing_range
from services.gateway.api.http_protocol import cut
from services.gateway.api.responses import retry_seconds, until_gone
from services.gateway.api.stream_parts import (
    ENDLESS,
    StreamPart,
    Wanted,
    beyond_end,
    bounded_part,
    length_of,
    not_yet,
    tagged,
    whole_part,
)
from services.gateway.errors import ApiError
from services.gateway.media.encodings import Encodings
from services.gateway.media.flac_stream import FlacStream
from services.gateway.media.growing_songs import GrowingSong, GrowingSongs, StreamCut
from services.gateway.media.listeners import Listener
from shared.aio import end
from shared.errors import HeartMulaError, ObjectError
from shared.schema.job import ENDED, Job
from shared.storage.objects import ObjectStore

log = logging.getLogger(__name__)

WAIT_SECONDS = 60.0  # for the first byte
STALLED_SECONDS = 300.0  # a player that is paused reads nothing for a while
BLOCK = 256 * 1024  # bytes
T = TypeVar("T")


class Stream(Protocol):
    """Audio that grows, as one listener reads it. See `FlacStream` and `Encoding`."""

    @property
    def edition(self) -> str | None:
        """Which audio of the song this is, see `Job.edition`."""

    @property
    def size(self) -> int | None:
        """Bytes of the whole audio, where that is known."""

    async def reach(self, offset: int) -> int:
        """Wait until there are more than `offset` bytes; returns how many there are, fewer after the song's end."""

    async def read(self, offset: int, most: int) -> bytes:
        """Read up to `most` bytes from an offset that was reached; none where the song ended without being finished."""

    def seconds(self, offset: int) -> float:
        """The second of the song that is at an offset."""


class AudioStreams:
    """Answers requests for the audio of songs in any state: live while they are made, from the file afterwards."""

    def __init__(self, store: ObjectStore, songs: GrowingSongs, encodings: Encodings, audio: AudioResponses) -> None:
        self._store, self._songs, self._encodings, self._audio = store, songs, encodings, audio
        self._serving: set[asyncio.Task[Any]] = set()
        self._closing = False

    def close(self) -> None:
        """Cut all streams: this process ends, and players go on with another one."""
        self._closing = True
        for task in self._serving:
            task.cancel()

    def require_open(self) -> None:
        """Raise a 503 `ApiError` where this process ends."""
        if self._closing:
            raise ApiError(503, "unavailable", "the gateway is shutting down; try again", headers={"Retry-After": "2"})

    async def stream(self, wanted: Wanted) -> ASGIApp:
        """A song's audio. Raises `ApiError` where there is none and will be none."""
        self.require_open()
        if wanted.is_file(wanted.job):
            return await self.file(wanted)
        if wanted.job.status in ENDED and wanted.job.status != "completed":
            raise no_audio(wanted.job)
        if wanted.start and wanted.start >= length_of(wanted.job):
            raise beyond_end(wanted.job)
        if retry_seconds(wanted.job, 0) > WAIT_SECONDS:  # it is not queued before the wait would be over
            raise not_yet(wanted.job)
        return cast("ASGIApp", StreamResponse(self, wanted))

    async def file(self, wanted: Wanted) -> ASGIApp:
        """The stored file, see `Wanted.is_file`; also for those who go on where its stream was cut.

        Raises `ApiError`.
        """
        asked = wanted.asked
        if asked.if_range is not None and asked.if_range == wanted.tag(wanted.job.edition):
            asked = Conditions(asked.method, asked.if_none_match, asked.range)
        return cast("ASGIApp", await self._audio.audio(wanted.job, wanted.form.audio_format, asked))

    async def serve(
        self, scope: Scope, receive: Receive, send: Send, work: Callable[[Send], Coroutine[Any, Any, T]]
    ) -> T | None:
        """Do the work of a response while its client is there and this process goes on; returns its result.

        None where it was cut. Raises what the work raises.
        """
        complete = False

        async def noting(message: Message) -> None:
            nonlocal complete
            await send(message)
            complete = message["type"] == "http.response.body" and not message["more_body"]

        gone = asyncio.create_task(until_gone(receive))
        serving = asyncio.create_task(work(noting))
        self._serving.add(serving)
        try:
            await asyncio.wait({gone, serving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._serving.discard(serving)
            await end(gone, serving)
        if not serving.cancelled():
            return serving.result()
        if not complete:  # else its client is reported as gone too, and may still read, and ask for more
            await cut(scope)
        return None

    @contextlib.asynccontextmanager
    async def listen(self, wanted: Wanted, *, live: bool = True) -> AsyncIterator[tuple[GrowingSong, Listener]]:
        """Follow a song for a listener, who counts as one while the context lasts.

        One who is not `live` waits for the end, and does not count: workers would hurry for nothing.
        """
        listener = Listener()
        listener.begin(wanted.start)
        async with self._songs.follow(wanted.job) as song:
            with song.listener(listener) if live else contextlib.nullcontext():
                yield song, listener

    @contextlib.contextmanager
    def open(self, wanted: Wanted, song: GrowingSong) -> Iterator[Stream]:
        """Read the audio that a song has now. Raises a 503 `ApiError`."""
        if wanted.form.audio_format == "flac" and not wanted.start:
            yield FlacStream(self._store, song, song.job.edition)
            return
        with self._encodings.listen(song.job, wanted.form, wanted.start) as encoding:
            yield encoding


@dataclass(frozen=True)
class StreamResponse:
    """An ASGI response that begins with the first byte: what goes wrong before is answered with a problem detail."""

    streams: AudioStreams
    wanted: Wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.wanted.asked.method == "HEAD":
            await self._start(send, StreamPart(0, None, {}, 200))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        finished = await self.streams.serve(scope, receive, send, functools.partial(self._serve, scope))
        if finished is not None:
            await (await self.streams.file(replace(self.wanted, job=finished)))(scope, receive, send)

    async def _serve(self, scope: Scope, send: Send) -> Job | None:
        """Send the stream, or nothing: returns the record of a song that was completed before there was audio."""
        begun = False
        try:
            async with self.streams.listen(self.wanted) as (song, listener):
                deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
                await self._audible(song, deadline)
                if self.wanted.is_file(song.job):
                    return song.job
                with self.streams.open(self.wanted, song) as stream:
                    part = await self._first_bytes(song, stream, deadline)
                    if part is None:
                        return song.job
                    listener.begin(stream.seconds(part.first))
                    begun = True
                    await self._start(send, part)
                    await self._send(send, part, stream, listener)
        except (StreamCut, HeartMulaError, TimeoutError) as error:
            if not begun:
                raise refusal(error) from None
            log.info("%s: a stream was cut: %s", self.wanted.job.job_id, str(error) or "its client does not read")
            await cut(scope)
        return None

    async def _audible(self, song: GrowingSong, deadline: float) -> None:
        """Wait for audio where the stream begins, or for the song's end. Raises `ApiError` where there is none."""
        try:
            async with asyncio.timeout_at(deadline):
                while song.job.status not in ENDED and song.job.playable_seconds <= self.wanted.start:
                    await song.news()
        except TimeoutError:
            raise not_yet(song.job) from None
        if song.job.status in ENDED and song.job.status != "completed":
            raise no_audio(song.job)

    async def _first_bytes(self, song: GrowingSong, stream: Stream, deadline: float) -> StreamPart | None:
        """Wait for the bytes that the response begins with; None where the song is a file by then.

        Raises `ApiError` where there are none.
        """
        asked, tag = self.wanted.asked, self.wanted.tag(stream.edition)
        # Of audio that was made anew, other bytes are at the range: all of it is sent, and nothing else is waited for.
        span = parse_growing_range(asked.range or "") if asked.if_range in (None, tag) else None
        first, last = span or (0, None)
        bounded = last is not None and last < ENDLESS
        size = 0
        try:
            async with asyncio.timeout_at(deadline):
                # At least `first` bytes: a client that goes on where the song's audio ends for now is answered at once,
                # for browsers take a refusal for the end. Who begins is answered with the first byte.
                size = await stream.reach(max(0, first - 1))
                if last is not None and bounded:
                    size = await stream.reach(last)
        except TimeoutError:
            pass
        except ObjectError:  # a finished song that never had parts has no FLAC beside its file
            if not self.wanted.is_file(song.job):
                raise
        job = song.job
        if self.wanted.is_file(job):
            return None
        if job.status in ENDED and job.status != "completed":
            raise no_audio(job)
        if stream.size is not None:
            return whole_part(stream.size, replace(self.wanted, job=job), tag)
        if size < max(1, first) or (bounded and size <= first):
            raise not_yet(job)
        if span is None:
            return StreamPart(0, None, tagged(tag), 200)
        if last is not None and bounded:
            return bounded_part(first, min(last, size - 1), "*", tag)
        return StreamPart(first, None, tagged(tag) | {"Content-Range": f"bytes {first}-{last or ENDLESS}/*"}, 206)

    async def _start(self, send: Send, part: StreamPart) -> None:
        headers = part.headers | {
            "Content-Type": self.wanted.form.content_type,
            "Content-Disposition": disposition(self.wanted.job, self.wanted.form.suffix),
            "Accept-Ranges": "bytes",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",  # nginx would read ahead and hold audio back
        }
        encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": part.status, "headers": encoded})

    async def _send(self, send: Send, part: StreamPart, stream: Stream, listener: Listener) -> None:
        """Send the body. Raises `TimeoutError` for a client that does not read, and what reading raises."""
        offset, stop = part.first, ENDLESS if part.last is None else part.last + 1
        while offset < stop and (size := await stream.reach(offset)) > offset:
            block = await stream.read(offset, min(BLOCK, size - offset, stop - offset))
            if not block:
                break
            await deliver(send, block)
            offset += len(block)
            listener.sent_to(stream.seconds(offset))
        if part.last is not None and offset < stop:
            raise StreamCut("the song ended within a part that was promised")
        await deliver(send, None)


async def deliver(send: Send, block: bytes | None) -> None:
    """Send a piece of a body; None ends it. Raises `TimeoutError` for a client that does not read."""
    async with asyncio.timeout(STALLED_SECONDS):
        await send({"type": "http.response.body", "body": block or b"", "more_body": block is not None})


def refusal(error: Exception) -> Exception:
    """What a client is answered that was sent nothing yet."""
    match error:
        case StreamCut():
            return ApiError(503, "unavailable", f"{error}; try again", headers={"Retry-After": "2"})
        case ObjectError():
            return expired()
    return error
