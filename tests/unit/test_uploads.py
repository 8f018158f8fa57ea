"""Request bodies become files: whole, hashed, within limits, and without a trace where they are refused."""

import asyncio
import hashlib
import shutil
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from services.gateway.uploads.pace import Pace, paced
from services.gateway.uploads.receiver import Upload, UploadLimits, receive
from services.gateway.uploads.room import Room
from shared.errors import NoRoom, RecordingRefused, Unavailable
from tests.unit.test_audio import files_of_at_most

DATA = np.random.default_rng(4).bytes(2_500_000) + b"\r\n--boundary\r\n--\r\n\r\n"
LIMITS = UploadLimits()


async def in_chunks(data: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]
    yield b""  # with which Litestar ends a body


def form(data: bytes) -> tuple[str, bytes]:
    """Content type and body, as httpx makes them."""
    request = httpx.Request("POST", "http://x", files={"file": ("../../etc/passwd", data, "text/html")})
    return request.headers["content-type"], request.read()


async def received(folder: Path, body: AsyncIterator[bytes], limits: UploadLimits = LIMITS, **about: Any) -> Upload:
    return await receive(body, folder / "upload", Room(folder), limits, **about)


def check(upload: Upload, data: bytes) -> None:
    assert (upload.size, upload.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert upload.path.read_bytes() == data
    upload.path.unlink()


async def test_a_body_is_written_as_it_is_however_it_arrives(tmp_path: Path) -> None:
    for size in (997, 65_536, len(DATA)):
        for content_type in ("", "audio/flac", "application/x-www-form-urlencoded", "multipart/mixed; boundary=x"):
            check(await received(tmp_path, in_chunks(DATA, size), content_type=content_type), DATA)
    check(await received(tmp_path, in_chunks(b"", 1)), b"")


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
async def test_the_file_of_a_form_is_written_however_it_arrives(tmp_path: Path, size: int) -> None:
    data = DATA if size > 7 else DATA[-3000:]
    content_type, body = form(data)
    upload = await received(tmp_path, in_chunks(body, size), content_type=content_type, content_length=len(body))
    assert [path.name for path in tmp_path.iterdir()] == ["upload"]
    check(upload, data)


class Reading:
    """A body without end, which counts what was read of it."""

    def __init__(self, chunk: bytes) -> None:
        self.chunk, self.read = chunk, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.read += len(self.chunk)
            yield self.chunk


async def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    limits = UploadLimits(most_bytes=3_000_000)
    check(await received(tmp_path, in_chunks(bytes(3_000_000), 8192), limits), bytes(3_000_000))
    content_type, start = form(bytes(100_000))
    preamble = content_type, b"no boundary " * 1000
    endless_header = content_type, b"--" + content_type.partition("boundary=")[2].encode() + b"\r\nX: " + b"x" * 10_000
    for kind, chunk in (("", bytes(9000)), (content_type, start[:-40]), preamble, endless_header):
        body = Reading(chunk)
        with pytest.raises(RecordingRefused) as raised:
            await received(tmp_path, aiter(body), limits, content_type=kind)
        assert raised.value.reason in ("too-large", "malformed")
        assert body.read <= 3_000_000 + 2 * 65_536 + len(chunk)
        assert list(tmp_path.iterdir()) == []


async def test_in_a_form_the_file_alone_counts(tmp_path: Path) -> None:
    limits = UploadLimits(most_bytes=3_000_000)
    for size in (3_000_000, 3_000_001):
        content_type, body = form(bytes(size))
        upload = received(tmp_path, in_chunks(body, 65_536), limits, content_type=content_type)
        if size == 3_000_000:
            check(await upload, bytes(size))
        else:
            with pytest.raises(RecordingRefused, match="at most 3 MB"):
                await upload


async def test_what_says_that_it_is_too_large_is_not_read_at_all(tmp_path: Path) -> None:
    body = Reading(b"x")
    for content_type, length in (("", 100_000_001), (form(b"")[0], 101_000_000)):
        with pytest.raises(RecordingRefused, match="at most 100 MB") as raised:
            await received(tmp_path, aiter(body), content_type=content_type, content_length=length)
        assert raised.value.reason == "too-large"
    assert body.read == 0


async def test_an_upload_is_never_whole_in_memory(tmp_path: Path) -> None:
    async def long(head: bytes, count: int, tail: bytes) -> AsyncIterator[bytes]:
        yield head
        for number in range(count):
            yield number.to_bytes(4) * 16_384
        yield tail

    content_type, body = form(b"here")
    head, tail = body.split(b"here")
    for kind, parts in (("", (b"", b"")), (content_type, (head, tail))):
        tracemalloc.start()
        try:
            upload = await received(tmp_path, long(parts[0], 800, parts[1]), content_type=kind)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert upload.size == 800 * 65_536
        assert peak < 8 << 20
        upload.path.unlink()


class Broken(NamedTuple):
    content_type: str
    body: bytes
    words: str


FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nsong\r\n'


@pytest.mark.parametrize(
    "broken",
    [
        Broken("multipart/form-data", PART + b"--x--\r\n", "no boundary"),
        Broken("multipart/form-data; boundary=", PART + b"--x--\r\n", "no boundary"),
        Broken(f"multipart/form-data; boundary={'x' * 71}", PART, "no boundary"),
        Broken(FORM, b"", "end"),
        Broken(FORM, PART, "end"),
        Broken(FORM, PART[:-8], "end"),
        Broken(FORM, b"no form at all", "end"),
        Broken(FORM, b"--x--\r\n", "no field 'file'"),
        Broken(FORM, PART + PART + b"--x--\r\n", "several files"),
        Broken(FORM, PART.replace(b'"file"', b'"song"') + b"--x--\r\n", "only field must be 'file'"),
        Broken(FORM, PART + PART.replace(b'"file"', b'"title"') + b"--x--\r\n", "only field must be 'file'"),
        Broken(FORM, PART.replace(b"Content-Disposition", b"X") + b"--x--\r\n", "Content-Disposition"),
        Broken(FORM, PART.replace(b"Content-", b"\xff\xfe") + b"--x--\r\n", "header"),
        Broken(FORM, PART.replace(b"\r\n\r\n", b"\r\nA: b" * 50 + b"\r\n\r\n") + b"--x--\r\n", "header count"),
    ],
    ids=range(14),
)
async def test_a_broken_form_is_refused(tmp_path: Path, broken: Broken) -> None:
    for size in (1, 10_000):
        with pytest.raises(RecordingRefused, match=broken.words) as raised:
            await received(tmp_path, in_chunks(broken.body, size), content_type=broken.content_type)
        assert raised.value.reason == "malformed"
        assert list(tmp_path.iterdir()) == []


# --- slow clients


def test_a_client_may_be_slower_than_the_lowest_rate_for_the_grace_and_no_longer() -> None:
    pace = Pace(lowest_rate=1000, grace=10)
    for _ in range(100):  # at the lowest rate it may go on forever
        pace.received(5000, waited=5)
    assert pace.left == 10
    for _ in range(9):  # at half of it, for twice the grace
        pace.received(1000, waited=2)
    assert pace.left == 1
    pace.received(50_000_000, waited=0.1)
    assert pace.left == 10  # speed is not saved up


async def test_a_client_that_stops_is_refused(tmp_path: Path) -> None:
    async def stopping() -> AsyncIterator[bytes]:
        yield bytes(1000)
        await asyncio.Event().wait()

    with pytest.raises(RecordingRefused, match="slower than 16 kB") as raised:
        await received(tmp_path, stopping(), UploadLimits(grace=0.05))
    assert raised.value.reason == "too-slow"
    assert list(tmp_path.iterdir()) == []


async def test_a_client_does_not_pay_for_the_time_that_the_gateway_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, passed = asyncio.get_running_loop(), 0.0
    real_time = loop.time
    monkeypatch.setattr(loop, "time", lambda: real_time() + passed)

    async def steady() -> AsyncIterator[bytes]:
        for _ in range(3):
            await asyncio.sleep(0)  # where it could run out of time
            yield b"x"

    async for _ in paced(steady(), lowest_rate=1, grace=20):
        passed += 1000


# --- room on the disk


def disk_of(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(total=total, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


async def test_uploads_at_once_share_the_room_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_of(monkeypatch, total=1000, free=220)  # of which 20 are spare
    room, wanted = Room(tmp_path), UploadLimits(most_bytes=150)
    gate, begun = asyncio.Event(), asyncio.Event()

    async def waiting() -> AsyncIterator[bytes]:
        begun.set()
        await gate.wait()
        yield bytes(100)

    first = asyncio.create_task(receive(waiting(), tmp_path / "first", room, wanted))
    await begun.wait()
    with pytest.raises(NoRoom, match="no room for another 150 bytes"):  # its length is not known
        await receive(in_chunks(b"x", 1), tmp_path / "second", room, wanted)
    check(await receive(in_chunks(b"x", 1), tmp_path / "second", room, wanted, content_length=50), b"x")
    gate.set()
    check(await first, bytes(100))
    check(await receive(in_chunks(b"x", 1), tmp_path / "second", room, wanted), b"x")


async def test_an_upload_keeps_room_for_what_is_still_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_of(monkeypatch, total=100_000_000, free=12_000_000)  # of which 2 are spare
    room, gates, reached = Room(tmp_path), [asyncio.Event(), asyncio.Event()], [asyncio.Event(), asyncio.Event()]

    async def in_two_parts() -> AsyncIterator[bytes]:
        for number in range(2):
            reached[number].set()
            await gates[number].wait()
            for _ in range(4):
                yield bytes(1_000_000)

    first = asyncio.create_task(receive(in_two_parts(), tmp_path / "first", room, LIMITS, content_length=8_000_000))
    for number, fits in enumerate((2_000_000, 6_000_000)):
        await reached[number].wait()
        with pytest.raises(NoRoom), room.reserve(fits + 1_000_000):
            pass
        with room.reserve(fits):
            pass
        gates[number].set()
    check(await first, bytes(8_000_000))


def test_what_is_written_is_reserved_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_of(monkeypatch, total=1000, free=220)
    room = Room(tmp_path / "made when needed")
    with room.reserve(200) as reservation:
        for written, fits in ((150, 140), (100, 190)):
            reservation.written(written)
            with pytest.raises(NoRoom), room.reserve(fits + 11):
                pass
            with room.reserve(fits):
                pass
    with room.reserve(200):
        pass


async def test_a_full_disk_is_no_fault_of_the_upload(tmp_path: Path) -> None:
    with files_of_at_most(1_000_000), pytest.raises(NoRoom, match="File too large"):
        await received(tmp_path, in_chunks(DATA, 65_536))
    assert list(tmp_path.iterdir()) == []


async def test_a_folder_that_cannot_be_used_is_no_fault_of_the_upload(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a file in its place")
    with pytest.raises(Unavailable, match="cannot be used"):
        await received(tmp_path / "data", in_chunks(DATA, 65_536))
    (tmp_path / "upload").write_bytes(b"another one's")
    with pytest.raises(Unavailable, match="File exists"):
        await received(tmp_path, in_chunks(DATA, 65_536))
    assert (tmp_path / "upload").read_bytes() == b"another one's"


# --- clients that go away


async def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_of(monkeypatch, total=1000, free=220)
    room, limits = Room(tmp_path), UploadLimits(most_bytes=200)

    async def going() -> AsyncIterator[bytes]:
        yield bytes(100)
        raise ConnectionResetError("gone")

    for _ in range(3):
        with pytest.raises(ConnectionResetError):
            await receive(going(), tmp_path / "upload", room, limits)
        assert list(tmp_path.iterdir()) == []


async def test_an_upload_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield bytes(1 << 20)
            begun.set()
            await asyncio.sleep(0)
        await asyncio.Event().wait()

    for turns in range(6):  # of the loop: between two chunks, and while a thread writes
        begun.clear()
        task = asyncio.create_task(received(tmp_path, endless()))
        await begun.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(tmp_path.iterdir()) == []
