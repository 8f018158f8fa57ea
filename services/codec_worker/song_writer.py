"""What becomes of a song's windows off the device, while the engine goes on: parts in the store, and finished files."""

import asyncio
import contextlib
import time

import numpy as np

from services.codec_worker.part_store import NewPart, PartStore
from services.codec_worker.song_file import SongFile
from services.codec_worker.song_stream import Piece, SongStream
from services.codec_worker.window_decoder import Window
from shared.schema.job import AudioPart
from shared.worker.job_context import JobContext
from shared.worker.signals import JobStopped, Paused
from shared.worker.worker_context import WorkerContext

_BACKLOG = 2  # windows in hand, the one that is being stored included, above which the engine is left
_PATIENCE = 1.0  # seconds until a song whose windows are not stored in time leaves the device
_LOOK_SECONDS = 0.1


class FileBuilder:
    """Fills a `SongFile` in the background: with the parts of earlier turns, then with the pieces of this one.

    It begins when the song is near its end: one that makes place for others before that would do it all over again.
    """

    def __init__(
        self, file: SongFile, parts: tuple[AudioPart, ...], context: JobContext, worker: WorkerContext
    ) -> None:
        """`parts` are those of earlier turns."""
        self._file, self._parts = file, parts
        self._context, self._worker = context, worker
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._near_end = asyncio.Event()
        self._abandoned = False
        self._task = asyncio.create_task(self._run())

    @property
    def failed(self) -> bool:
        """Whether a part could not be used, or the disk is full; `finish` says what it was."""
        return self._task.done() and self._task.exception() is not None

    def begin(self) -> None:
        """Begin: the song is near its end."""
        self._near_end.set()

    def add(self, piece: Piece) -> None:
        """Hand in the next piece."""
        self._pieces.put_nowait(piece)

    async def finish(self) -> None:
        """Wait until everything is in the finished file.

        Raises `ObjectError` for a part that is missing or damaged, `OSError` for a full disk, `JobStopped`.
        """
        self.begin()
        self._pieces.put_nowait(None)
        await self._task
        await asyncio.to_thread(self._file.finish)

    async def abandon(self) -> None:
        """Wait until nothing is written any more."""
        self._abandoned = True
        self.begin()
        self._pieces.put_nowait(None)
        await asyncio.wait({self._task})
        self._task.exception()  # which is of no interest any more

    async def _run(self) -> None:
        await self._near_end.wait()
        for part in self._parts:
            data = await self._worker.retry(lambda part=part: self._get(part), self._context)  # type: ignore[misc]
            await asyncio.to_thread(self._file.add_part, part, data)
        while (piece := await self._pieces.get()) is not None and not self._abandoned:
            await asyncio.to_thread(self._file.add, piece)

    async def _get(self, part: AudioPart) -> bytes:
        if self._abandoned:
            raise JobStopped("the file is not wanted any more")
        return await self._worker.store.get(part.key)


class SongWriter:
    """Encodes and stores the windows of a song in the background, in order."""

    def __init__(self, stream: SongStream, parts: PartStore, builder: FileBuilder | None, *, flac: bool) -> None:
        """`builder` makes the finished files of a song that ends; without parts in FLAC only where `flac`."""
        self._stream, self._parts, self._builder, self._flac = stream, parts, builder, flac
        self._windows: asyncio.Queue[Window | None] = asyncio.Queue()
        self._backlog, self._ended = 0, False
        self._stored = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def failed(self) -> bool:
        """Whether it makes no sense to decode on; `close` says why."""
        return self._task.done() or (self._builder is not None and self._builder.failed)

    @property
    def full(self) -> bool:
        """Whether as many windows wait as may."""
        return self._backlog > _BACKLOG

    def add(self, window: Window) -> None:
        """Hand in the next window."""
        self._backlog += 1
        self._ended = window.state is None
        self._windows.put_nowait(window)

    def near_end(self) -> None:
        """Say that the window in work and at most one more are left of a song that ends."""
        if self._builder is not None:
            self._builder.begin()

    def end(self) -> None:
        """Say that the song is whole: its last window may have come before its end was known."""
        if not self._ended:
            self.add(Window(np.zeros((0, 2), np.float32), None, more=False))

    async def make_room(self, context: JobContext) -> None:
        """Wait until another window may come. Raises `Paused` when the song has to leave the device before that."""
        until = time.monotonic() + _PATIENCE
        while self.full and not self.failed:
            context.check_pause()
            if time.monotonic() > until:
                raise Paused("its audio is not stored as fast as it is decoded")
            self._stored.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._stored.wait()

    async def close(self) -> None:
        """Wait until everything that was handed in is stored, and nothing goes on.

        Raises `SongError` for audio that is not finite, else as `PartStore.add`.
        """
        self._windows.put_nowait(None)
        await self._task

    async def _run(self) -> None:
        while (window := await self._windows.get()) is not None:
            await self._take(window)
            self._backlog -= 1
            self._stored.set()

    async def _take(self, window: Window) -> None:
        last = window.state is None
        encode = not last or self._flac or bool(self._parts.parts)
        piece = await asyncio.to_thread(self._stream.add, window.audio, last=last, encode=encode)
        if self._builder is not None:
            self._builder.add(piece)
        if window.state is not None:
            header = b"" if self._parts.parts else self._stream.header
            state = await asyncio.to_thread(self._stream.save, window.state)
            await self._parts.add(
                NewPart(data=header + piece.frames, samples=len(piece.pcm), state=state, peaks=self._stream.peaks())
            )
