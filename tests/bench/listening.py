"""A listener to a song that is being made, and a simulated player of what it was sent when."""

import asyncio
import time
from bisect import bisect_right
from dataclasses import dataclass, field

import httpx

BLOCK = 4096  # samples a channel in each frame of a song's FLAC but the last
_SYNC = b"\xff\xf8"  # begins a frame whose blocks have one size (RFC 9639, section 9.1)
_POLYNOMIAL = 0x107  # of the CRC-8 of a frame's header (section 9.1.8)
_LAST = 0x80  # flag of the last metadata block (section 8.1)
_BLOCK_SIZE_BYTES = {6: 1, 7: 2}  # behind a frame's number, by the code of the block size (section 9.1.6)
_SAMPLE_RATE_BYTES = {12: 1, 13: 2, 14: 2}  # likewise (section 9.1.7)


@dataclass
class Heard:
    """What a listener received, and when."""

    data: bytearray = field(default_factory=bytearray)
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # monotonic time; bytes so far


@dataclass(frozen=True)
class Play:
    """How a stream sounded. Times in seconds."""

    first_sound: float  # monotonic time at which the first byte of audio came
    underruns: list[float]  # length of each silence between the first sound and the last


async def listen(http: httpx.AsyncClient, job_id: str) -> Heard:
    """Receive a song's FLAC stream from its beginning to its end. Raises `RuntimeError` if the gateway refuses it."""
    heard = Heard()
    while True:
        async with http.stream("GET", f"/generate/{job_id}/stream", params={"format": "flac"}) as answer:
            if answer.status_code == 200:
                async for chunk in answer.aiter_raw():
                    heard.data += chunk
                    heard.arrivals.append((time.monotonic(), len(heard.data)))
                return heard
            text = (await answer.aread()).decode(errors="replace")
            if answer.status_code != 409 or "Retry-After" not in answer.headers:
                raise RuntimeError(f"the stream of {job_id}: {answer.status_code} {text}")
        await asyncio.sleep(float(answer.headers["Retry-After"]))


def play(heard: Heard) -> Play:
    """Play what was heard in real time, from its first sound on; whenever nothing is left, wait for the next frame."""
    data = bytes(heard.data)
    bounds, sample_rate = frame_bounds(data), int.from_bytes(data[18:21]) >> 4  # in STREAMINFO (section 8.2)
    first_sound = next(moment for moment, size in heard.arrivals if size > bounds[0])
    underruns: list[float] = []
    dry_at, played = first_sound, 0.0  # when what has come will have been played; seconds that have come
    for moment, size in heard.arrivals:
        seconds = max(0, bisect_right(bounds, size) - 1) * BLOCK / sample_rate
        if seconds <= played:
            continue
        if played and moment > dry_at:
            underruns.append(moment - dry_at)
        dry_at = max(dry_at, moment) + seconds - played
        played = seconds
    return Play(first_sound, underruns)


def frame_bounds(data: bytes) -> list[int]:
    """Offset of each frame of a FLAC file, and of its end. Raises `ValueError` for a file without frames."""
    bounds = [_header_end(data)]
    while (found := _frame_from(data, bounds[-1] + 1, len(bounds))) is not None:
        bounds.append(found)
    if _frame_from(data, bounds[0], 0) != bounds[0]:
        raise ValueError("no FLAC frame behind the metadata")
    return [*bounds, len(data)]


def _header_end(data: bytes) -> int:
    """Offset of the first byte behind the metadata blocks."""
    if data[:4] != b"fLaC":
        raise ValueError("no FLAC file")
    at, last = 4, False
    while not last:
        last = bool(data[at] & _LAST)
        at += 4 + int.from_bytes(data[at + 1 : at + 4])
    return at


def _frame_from(data: bytes, start: int, number: int) -> int | None:
    """Offset of frame `number`, not before `start`; None if there is none."""
    coded = chr(number).encode("utf-8", "surrogatepass")
    at = data.find(_SYNC, start)
    while at >= 0:
        end = at + 4 + len(coded)
        if data[at + 4 : end] == coded:
            end += _BLOCK_SIZE_BYTES.get(data[at + 2] >> 4, 0) + _SAMPLE_RATE_BYTES.get(data[at + 2] & 15, 0)
            if data[end : end + 1] == _crc8(data[at:end]):
                return at
        at = data.find(_SYNC, at + 1)
    return None


def _crc8(data: bytes) -> bytes:
    value = int.from_bytes(data) << 8
    while (surplus := value.bit_length() - _POLYNOMIAL.bit_length()) >= 0:
        value ^= _POLYNOMIAL << surplus
    return value.to_bytes(1)
