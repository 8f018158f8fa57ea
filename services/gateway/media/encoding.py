"""One encoding of a song that its listeners share: in another format, or from one of its seconds on.

It is written to a scratch file while the song grows. All listeners read that file, each at its own pace.
"""

import asyncio
import bisect
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from services.gateway.errors import ApiError
from services.gateway.media.flac_stream import FlacStream
from services.gateway.media.growing_songs import StreamCut
from services.gateway.media.song_encoder import SongEncoder
from shared.audio.flac import stream_header
from shared.audio.forms import Form
from shared.audio.tags import SongTags
from shared.errors import HeartMulaError
from shared.schema.job import Job

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_COPY = 1024 * 1024  # bytes
_NO_TAGS = SongTags(title=None, tags="", lyrics="", seed=None)


class Encoding:
    """The bytes of an encoding, as all of its listeners read them. Methods raise what ended the encoding."""

    def __init__(self, job: Job, form: Form, start: float, threads: ThreadPoolExecutor) -> None:
        """The song's audio of the edition that its record names; `start` in seconds of the song."""
        self._job, self._form, self._start, self._threads = job, form, start, threads
        self._size, self._marks = 0, [(0, start)]  # bytes, and the second of the song that each number of them reaches
        self._path: Path | None = None  # once there is something
        self._whole = False
        self._error: Exception | None = None
        self._grown = asyncio.Event()

    @property
    def edition(self) -> str | None:
        """Which audio of the song it is made from."""
        return self._job.edition

    @property
    def size(self) -> int | None:
        """Bytes of the whole audio, once that is encoded."""
        return self._size if self._whole else None

    @property
    def failed(self) -> bool:
        """Whether it cannot be read any more."""
        return self._error is not None

    async def reach(self, offset: int) -> int:
        """Wait until there are more than `offset` bytes; returns how many there are, fewer after the song's end."""
        while self._error is None and self._size <= offset and not self._whole:
            await self._grown.wait()
        if self._error is not None:
            raise self._error
        return self._size

    async def read(self, offset: int, most: int) -> bytes:
        """Read up to `most` bytes from an offset that was reached."""
        assert self._path is not None
        try:
            return await asyncio.to_thread(_read, self._path, offset, min(most, self._size - offset))
        except FileNotFoundError:
            raise self._error or StreamCut("the last listener had left") from None

    def seconds(self, offset: int) -> float:
        """The second of the song that is at an offset, rounded up by less than a second."""
        return self._marks[min(bisect.bisect_left(self._marks, (offset, 0.0)), len(self._marks) - 1)][1]

    async def run(self, source: FlacStream, folder: Path) -> None:
        """Encode until the song has ended, into a folder of its own. Its readers hear of what it raises, see `fail`."""
        path, loop = folder / "stream", asyncio.get_running_loop()

        def grown(size: int, seconds: float) -> None:
            loop.call_soon_threadsafe(self._grow, path, size, seconds)

        encoder = SongEncoder(path, self._form, self._job.request, self._start, grown)
        try:
            await self._encode(source, encoder, folder / "piece")
            self._whole = True
            self._wake()
        except BaseException as error:
            self.fail(error)  # before the file is closed, which may have to wait for a thread
            raise
        finally:
            encoder.stop()
            closing = asyncio.wrap_future(self._threads.submit(encoder.abandon))
            while not closing.done():  # the folder is removed next
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({closing})

    def fail(self, error: BaseException) -> None:
        """End it for its readers, with the reason. Only the first error counts; those of the gateway are logged."""
        if self._error is not None:
            return
        name = f"{self._job.job_id} as {self._form} from {self._start:g} s"
        match error:
            case StreamCut() | HeartMulaError():
                self._error = error
            case asyncio.CancelledError():
                self._error = StreamCut("the last listener had left")
            case OSError():
                log.error("%s cannot be written: %s", name, error)
                words = "the gateway cannot write files; its log says why"
                self._error = ApiError(503, "unavailable", words, headers={"Retry-After": "15"})
            case _:
                log.error("%s: unexpected %s", name, type(error).__name__, exc_info=error)
                self._error = StreamCut("the song cannot be encoded")
        self._wake()

    async def _encode(self, source: FlacStream, encoder: SongEncoder, piece: Path) -> None:
        offset = 0
        while (size := await source.reach(offset)) > offset:
            skipped, samples = source.boundary(encoder.first_sample(source.rate))
            if skipped > offset:
                offset = skipped
                encoder.pass_over(samples)
                continue
            if not await self._fetch(source, piece, offset, size):
                break
            await self._in_thread(encoder.begin, piece)
            while await self._in_thread(encoder.go_on):
                pass
            offset = size
        await self._in_thread(encoder.finish)

    async def _fetch(self, source: FlacStream, piece: Path, offset: int, end: int) -> bool:
        """Copy whole FLAC frames to a file of their own; False where the song ended without being finished."""
        with piece.open("wb") as file:
            if offset:
                file.write(stream_header(source.rate, _NO_TAGS))
            while offset < end:
                block = await source.read(offset, min(_COPY, end - offset))
                if not block:
                    return False
                await asyncio.to_thread(file.write, block)
                offset += len(block)
        return True

    async def _in_thread(self, call: Callable[..., _T], *arguments: Path) -> _T:
        return await asyncio.wrap_future(self._threads.submit(call, *arguments))

    def _grow(self, path: Path, size: int, seconds: float) -> None:
        self._path, self._size = path, size
        self._marks.append((size, seconds))
        self._wake()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()


def _read(path: Path, offset: int, most: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(most)
