"""Windows one after the other: the engine is held for as long as the song may have it, and for nothing else."""

import asyncio
import functools
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto

from services.codec_worker.device_queue import DeviceQueue
from services.codec_worker.engines.base import CodecEngine, DecodeStep
from services.codec_worker.song_in_work import SongInWork
from services.codec_worker.song_writer import SongWriter
from services.codec_worker.window_decoder import WindowDecoder
from shared.errors import DeviceBroken, NotFound, Unavailable
from shared.nats.errors import nats_errors
from shared.nats.streams import songs_in_lane
from shared.nats.subjects import DEC, DEC_CONSUMERS, decode_lane
from shared.worker.signals import Paused
from shared.worker.throughput import Throughput
from shared.worker.worker_context import WorkerContext

_LABEL = "decode"  # in the device's ledger


class _Rest(Enum):
    """Where the windows of a song go on that are final and not decoded."""

    NONE = auto()  # there are none
    IN_HAND = auto()  # the song waits for the engine again
    IN_QUEUE = auto()  # the song makes place for others


class DecodingLoop:
    """Decodes songs with one engine."""

    def __init__(self, engine: CodecEngine, rate: Throughput) -> None:
        self._engine, self._rate, self._queue = engine, rate, DeviceQueue()

    async def run(self, song: SongInWork, writer: SongWriter) -> bool:
        """Decode what is final of a song, and wait until `writer` has stored it; the engine is left before that.

        Returns whether that was all; else the song made place at a window for others whose listeners run dry sooner.
        However it ends, nothing goes on in the background. Raises `Paused` at a window when the song has to leave the
        device, or within one when the worker shuts down.
        """
        context = song.context
        try:
            rest = await self._decode(song, writer)
        except Paused:
            context.off_device.set()
            await writer.close()
            song.announce_pause()
            raise
        except Exception as error:
            if not isinstance(error, DeviceBroken):  # the lease stays until this process is gone
                context.off_device.set()
            with suppress(Exception):
                await writer.close()
            raise
        context.off_device.set()
        if rest is _Rest.NONE and song.tokens.ended and not writer.failed:
            song.announce_storing()
            writer.end()
        await writer.close()
        if rest is _Rest.IN_QUEUE:
            song.announce_pause()
        return rest is _Rest.NONE

    async def _decode(self, song: SongInWork, writer: SongWriter) -> _Rest:
        rest = _Rest.IN_HAND
        while rest is _Rest.IN_HAND and not writer.failed:
            async with self._queue.turn(song.job_id):
                rest = await self._decode_windows(song, writer)
            if rest is _Rest.IN_HAND:
                await writer.make_room(song.context)
        return _Rest.NONE if writer.failed else rest

    async def _decode_windows(self, song: SongInWork, writer: SongWriter) -> _Rest:
        """Decode windows while the song may have the engine. Returns what is to become of the others."""
        context, worker, before = song.context, song.worker, song.state.samples
        near_end = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, writer.near_end)
        context.check()
        context.check_pause()
        context.turn.place_work(_LABEL, self._engine.work_bytes)
        try:
            decoder = await worker.in_engine(lambda: self._decoder(song, near_end))
            song.announce()
            try:
                while window := await worker.in_engine(decoder.next):
                    writer.add(window)
                    if window.state is not None:
                        song.state = window.state
                    if not window.more or writer.failed:
                        return _Rest.NONE
                    context.check_pause()
                    decoded = (song.state.samples - before) / song.sample_rate
                    rest = await self._after_window(song, decoded)
                    if rest is not None or writer.full:
                        return rest or _Rest.IN_HAND
            finally:
                await worker.in_engine(decoder.close)
        finally:
            context.turn.remove(_LABEL)
        return _Rest.NONE

    def _decoder(self, song: SongInWork, near_end: Callable[[], object]) -> WindowDecoder:
        share, begins = song.share, True  # begins: the next step is a window's first

        def on_step(step: DecodeStep) -> None:
            nonlocal begins
            if begins and step.total - step.done - step.window_left <= step.window_left + 1:
                near_end()
            begins = not step.window_left
            song.on_step(step, share)

        return WindowDecoder(
            self._engine,
            song.state,
            song.tokens.codes,
            ended=song.tokens.ended,
            kept=song.kept,
            context=song.context,
            draining=song.worker.draining,
            rate=self._rate,
            on_step=on_step,
        )

    async def _after_window(self, song: SongInWork, decoded: float) -> _Rest | None:
        """Where a song gives way, now that `decoded` seconds of it were made: to whom a listener runs dry sooner.

        None where it may go on. Raises `Paused` for a song without a listener that makes place for one in the queue.
        """
        listeners = song.worker.listeners
        own = listeners.dry_in(song.job_id)
        if self._queue.is_pressed(None if own is None else own + decoded, listeners.dry_in):
            return _Rest.IN_HAND
        if not await live_songs_wait(song.worker):
            return None
        if own is None:
            if decode_lane(song.context.message.subject) == "normal":
                raise Paused("a song that somebody listens to waits")
            return _Rest.IN_QUEUE  # at the end of a lane: given back, it would come before those that wait
        others = [listeners.dry_in(job_id) for job_id in await _live_songs(song) if job_id != song.job_id]
        pressed = any(seconds is not None and seconds < own + decoded for seconds in others)
        return _Rest.IN_QUEUE if pressed else None


async def live_songs_wait(worker: WorkerContext) -> bool:
    """Whether songs with listeners are in the queue. Not where that cannot be known: throughput comes first."""
    try:
        with nats_errors("the queue cannot be looked at"):
            info = await worker.nc.jetstream().consumer_info(DEC, DEC_CONSUMERS["high"])
    except (Unavailable, NotFound):
        return False
    return bool(info.num_pending)


async def _live_songs(song: SongInWork) -> set[str]:
    """The songs in the queue that somebody listens to, those in the hands of workers included. Likewise."""
    try:
        with nats_errors("the queue cannot be looked at"):
            return await songs_in_lane(song.worker.nc.jetstream(), "high")
    except (Unavailable, NotFound):
        return set()
