"""Writes an upload to a file of the data folder while it arrives; of no size is the whole in memory."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from services.gateway.uploads.form import file_in_form, form_boundary
from services.gateway.uploads.pace import paced
from services.gateway.uploads.room import Reservation, Room, disk_error
from shared.errors import RecordingRefused

_BLOCK = 1 << 20  # bytes that are written at once
_FORM = 64 * 1024  # bytes that a body may have beside the file


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """What one upload may take."""

    most_bytes: int = 100_000_000
    lowest_rate: float = 16_000.0  # bytes a second, as of a phone with a bad connection
    grace: float = 20.0  # seconds for which it may be slower


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A file that arrived whole."""

    path: Path
    size: int  # bytes
    sha256: str  # hexadecimal


async def receive(
    body: AsyncIterable[bytes],
    target: Path,
    room: Room,
    limits: UploadLimits,
    *,
    content_type: str = "",
    content_length: int | None = None,
) -> Upload:
    """Write a request's body to `target`, where no file may be yet: a form's only file, or the body as it is.

    Any content type but multipart/form-data is the file itself: what it holds, its bytes say. Room for all of it is
    reserved before the first byte is read, as for the largest where `content_length` is not known.

    Raises `RecordingRefused` for an upload that is too large, too slow or a broken form, `NoRoom` where the disk has
    not enough room, `Unavailable` for a broken one, and what `body` raises where the client goes away. After any
    error, and when the caller is cancelled, there is no file at `target`, and its room is free again.
    """
    boundary = form_boundary(content_type)
    most = limits.most_bytes + (_FORM if boundary is not None else 0)
    announced = most if content_length is None else content_length
    if announced > most:
        raise _too_large(limits)
    chunks = _bounded(paced(body, limits.lowest_rate, limits.grace), most, limits)
    if boundary is not None:
        chunks = file_in_form(chunks, boundary)
    with room.reserve(announced) as reservation, _UploadFile(target, reservation) as file:
        await _write(chunks, file, limits)
        return Upload(path=target, size=file.size, sha256=file.sha256)


def _too_large(limits: UploadLimits) -> RecordingRefused:
    return RecordingRefused(
        "too-large",
        f"an upload may have at most {limits.most_bytes / 1e6:g} MB; FLAC, MP3 and Ogg are smaller than WAV",
    )


async def _bounded(body: AsyncIterable[bytes], most: int, limits: UploadLimits) -> AsyncIterable[bytes]:
    """Pass on so many bytes: a form may have more around its file, but not without end."""
    async for chunk in body:
        most -= len(chunk)
        if most < 0:
            raise _too_large(limits)
        yield chunk


async def _write(chunks: AsyncIterable[bytes], file: "_UploadFile", limits: UploadLimits) -> None:
    block = bytearray()
    async for chunk in chunks:
        block += chunk
        if file.size + len(block) > limits.most_bytes:
            raise _too_large(limits)
        if len(block) >= _BLOCK:
            await asyncio.to_thread(file.write, bytes(block))
            block.clear()
    await asyncio.to_thread(file.write, bytes(block))


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error) from error


class _UploadFile:
    """A new file that is written in threads; leaving the context with an error removes it.

    Closing it waits for a write that the caller, cancelled, no longer waits for.
    """

    def __init__(self, path: Path, reservation: Reservation) -> None:
        self._path, self._reservation = path, reservation
        self._lock, self._digest = threading.Lock(), hashlib.sha256()
        with _disk_errors():
            self._file = path.open("xb", buffering=0)
        self.size = 0  # bytes

    def write(self, block: bytes) -> None:
        """Append all of a block, unless the file was closed meanwhile."""
        rest = memoryview(block)
        with self._lock, _disk_errors():
            while rest and not self._file.closed:
                rest = rest[self._file.write(rest) :]
            self._digest.update(block)
            self.size += len(block)
            self._reservation.written(len(block))

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of all that was written."""
        return self._digest.hexdigest()

    def __enter__(self) -> "_UploadFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            try:
                with _disk_errors():
                    self._file.close()  # where network file systems report a full disk
            finally:
                if kind is not None:
                    self._path.unlink(missing_ok=True)
