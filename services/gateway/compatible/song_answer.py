"""The answer to a request that waits for its song: the song's audio as it is made, in the way of a vendor.

A vendor's route translates its request into an `Order`, and returns `SongAnswers.answer` of it. Errors up to the first
byte are raised, for the route's exception handler to answer in the vendor's shape; later ones cut the connection.
"""

import asyncio
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from litestar.types import ASGIApp, Receive, Scope, Send

from services.gateway.api.audio_response import no_audio
from services.gateway.api.audio_stream import BLOCK, AudioStreams, Stream, deliver, refusal
from services.gateway.api.conditional import Conditions
from services.gateway.api.http_protocol import cut
from services.gateway.api.stream_parts import ENDLESS, Wanted
from services.gateway.auth.api_keys import Caller
from services.gateway.compatible.requested_songs import RequestedSong, RequestedSongs
from services.gateway.media.encodings import EncodersBusy
from services.gateway.media.growing_songs import GrowingSong, StreamCut
from services.gateway.media.listeners import Listener
from shared.audio.forms import Form
from shared.errors import HeartMulaError
from shared.schema.job import ENDED, Job

log = logging.getLogger(__name__)

_BUSY_SECONDS = 1.0  # between two looks whether a song can be encoded for one more listener


class Envelope:
    """How a song's audio is sent: this one sends it bare. Vendors' envelopes derive from it."""

    def headers(self, job: Job, form: Form) -> dict[str, str]:
        """Headers of the response, sent with the first byte: the content type at least."""
        return {"Content-Type": form.content_type, "X-Request-ID": job.job_id}

    async def head(self, job: Job) -> bytes:
        """What is sent before the audio, given the record as of then: see `Order.whole`. Raises `HeartMulaError`."""
        return b""

    def block(self, audio: bytes) -> bytes:
        """A piece of the audio, some hundred KiB at most."""
        return audio

    async def tail(self, job: Job) -> bytes:
        """What is sent after the audio, given the record of the completed song. Raises `HeartMulaError`."""
        return b""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A vendor's request for a song, translated."""

    caller: Caller
    digest: str  # requests with the same one share a song, see `digest_of_request`
    song: Mapping[str, Any]  # the fields of a `GenerateRequest` but `format`
    form: Form
    envelope: Envelope
    whole: bool = False  # begin when all of the file is there, instead of with its first audio


class SongAnswers:
    """Answers orders for songs."""

    def __init__(self, requested: RequestedSongs, streams: AudioStreams) -> None:
        self.requested, self.streams = requested, streams

    def answer(self, order: Order) -> ASGIApp:
        """Answer an order: the song is submitted when the response begins. Raises a 503 `ApiError`."""
        self.streams.require_open()
        return cast("ASGIApp", _SongAnswer(self, order))


@dataclass
class _SongAnswer:
    """An ASGI response that begins with the first byte of audio, for which it waits as long as its client does."""

    answers: SongAnswers
    order: Order
    begun: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answers.streams.serve(scope, receive, send, functools.partial(self._serve, scope))

    async def _serve(self, scope: Scope, send: Send) -> None:
        # As FLAC, from which every form is made.
        song, order = {**self.order.song, "format": "flac"}, self.order
        async with self.answers.requested.request(order.caller, order.digest, song) as requested:
            try:
                await self._send(requested, send)
            except (StreamCut, HeartMulaError, TimeoutError) as error:
                if not self.begun:
                    raise refusal(error) from None
                log.info("%s: an answer was cut: %s", requested.job.job_id, str(error) or "its client does not read")
                await cut(scope)

    async def _send(self, requested: RequestedSong, send: Send) -> None:
        """Send the whole answer. Raises `StreamCut`, `HeartMulaError`, or `TimeoutError` for one who does not read."""
        wanted = Wanted(requested.job, self.order.form, 0.0, Conditions("POST", None, None))
        async with self.answers.streams.listen(wanted, live=not self.order.whole) as (song, listener):
            while True:
                try:
                    if await self._send_edition(requested, wanted, song, listener, send):
                        return
                except EncodersBusy:  # the client came to wait
                    await asyncio.sleep(_BUSY_SECONDS)

    async def _send_edition(
        self, requested: RequestedSong, wanted: Wanted, song: GrowingSong, listener: Listener, send: Send
    ) -> bool:
        """Send the audio that a song has now; False where that changed before there was a byte. Raises as `_send`."""
        while song.job.status not in ENDED and (self.order.whole or not song.job.playable_seconds):
            await song.news()
        _require_audio(requested, song)
        with self.answers.streams.open(wanted, song) as stream:
            try:
                size = await stream.reach(ENDLESS if self.order.whole else 0)
            except StreamCut:
                if song.job.edition != stream.edition:
                    return False
                raise
            if not size:
                _require_audio(requested, song)
            await self._begin(song.job, send)
            await self._send_audio(stream, listener, send)
        if song.job.status != "completed":  # a client that repeats its request is answered with the reason
            raise StreamCut(f"the song is {song.job.status}")
        if tail := await self.order.envelope.tail(song.job):
            await deliver(send, tail)
        await deliver(send, None)
        requested.retire()
        return True

    async def _begin(self, job: Job, send: Send) -> None:
        headers = {
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",  # nginx would read ahead and hold audio back
        } | self.order.envelope.headers(job, self.order.form)
        encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        head = await self.order.envelope.head(job)
        await send({"type": "http.response.start", "status": 200, "headers": encoded})
        self.begun = True
        if head:
            await deliver(send, head)

    async def _send_audio(self, stream: Stream, listener: Listener, send: Send) -> None:
        offset = 0
        while (size := await stream.reach(offset)) > offset:
            block = await stream.read(offset, min(BLOCK, size - offset))
            if not block:
                return
            await deliver(send, self.order.envelope.block(block))
            offset += len(block)
            listener.sent_to(stream.seconds(offset))


def _require_audio(requested: RequestedSong, song: GrowingSong) -> None:
    """Raise a 410 `ApiError` for a song that ended without being completed."""
    if song.job.status in ENDED and song.job.status != "completed":
        requested.retire()
        raise no_audio(song.job)
