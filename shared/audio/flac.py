"""A song's FLAC, made piece by piece: a header of fixed length, and frames that equal those of a whole encode.

Written after RFC 9639 (Free Lossless Audio Codec). A frame depends on its own samples and its number alone, so the
frames of a piece may be made apart and joined. Stream and finished file differ in STREAMINFO only.
"""

import hashlib
from functools import cache
from io import BytesIO
from typing import Final

import numpy as np
import soundfile

from shared.audio.reading import read_audio
from shared.audio.tags import SongTags, vorbis_comment
from shared.errors import ObjectError

BLOCK: Final = 4096  # samples a channel in a frame, at libsndfile's compression level
_CHANNELS, _BITS = 2, 16
_MARK = b"fLaC"
_STREAMINFO, _VORBIS_COMMENT, _LAST = 0, 4, 0x80  # types of metadata blocks; a flag
_TOTALS = 18  # offset in a file of 36 bits of total samples, from the second half of a byte on, and of the MD5
_CRC8, _CRC16 = 0x107, 0x18005  # generator polynomials of a frame header and of a frame, RFC 9639 §9.1.8 and §9.3
_BLOCK_SIZE_BYTES = {6: 1, 7: 2}  # of a frame header, by the code of the block size (§9.1.6)
_SAMPLE_RATE_BYTES = {12: 1, 13: 2, 14: 2}  # (§9.1.7)


def stream_header(sample_rate: int, tags: SongTags) -> bytes:
    """The bytes before the first frame: STREAMINFO that leaves length and MD5 open (§8.2), then the tags."""
    form = sample_rate << 44 | (_CHANNELS - 1) << 41 | (_BITS - 1) << 36  # 64 bits; the low 36 are total samples
    info = BLOCK.to_bytes(2) * 2 + bytes(6) + form.to_bytes(8) + bytes(16)
    comment = vorbis_comment(tags, framing=False)
    return _MARK + _metadata(_STREAMINFO, info) + _metadata(_VORBIS_COMMENT | _LAST, comment)


def _metadata(kind: int, content: bytes) -> bytes:
    return bytes([kind]) + len(content).to_bytes(3) + content


def finished_header(header: bytes, samples: int, md5: bytes) -> bytes:
    """A stream's header for the finished file, equally long: with the number of samples a channel, and the MD5.

    The MD5 is that of all samples as interleaved little-endian int16.
    """
    form = int.from_bytes(header[_TOTALS : _TOTALS + 8]) | samples
    return header[:_TOTALS] + form.to_bytes(8) + md5 + header[_TOTALS + 8 + len(md5) :]


class _Frames(BytesIO):
    """What libsndfile writes, kept apart write by write: libFLAC hands over one frame at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[bytes] = []

    def write(self, data: bytes) -> int:  # type: ignore[override]  # soundfile hands over bytes alone
        if data[:2] == b"\xff\xf8":  # the sync code of a frame whose blocks have one size (§9.1)
            self.frames.append(data)
        return super().write(data)


def encode_blocks(pcm: np.ndarray, first_block: int, sample_rate: int) -> bytes:
    """The frames of int16 ``[samples, 2]``, numbered from `first_block` on; equal to those of a whole encode.

    The number of samples is a multiple of `BLOCK`, except at the end of a song.
    """
    written = _Frames()
    with soundfile.SoundFile(written, "w", sample_rate, _CHANNELS, "PCM_16", format="FLAC") as file:
        for start in range(0, len(pcm), sample_rate):  # a second: encoders were seen to crash on whole songs
            file.write(pcm[start : start + sample_rate])
    if len(written.frames) != -(-len(pcm) // BLOCK):
        raise RuntimeError(f"libsndfile made {len(written.frames)} frames of {len(pcm)} samples")
    return b"".join(_renumbered(frame, at, first_block + at) for at, frame in enumerate(written.frames))


def _renumbered(frame: bytes, old: int, new: int) -> bytes:
    """Give a frame another number (§9.1.5), and the checksums that it has then."""
    if old == new:
        return frame
    extra = _BLOCK_SIZE_BYTES.get(frame[2] >> 4, 0) + _SAMPLE_RATE_BYTES.get(frame[2] & 15, 0)
    number = 4 + len(_coded(old))
    body = number + extra + 1
    head = frame[:4] + _coded(new) + frame[number : number + extra]
    head += _crc(head, _CRC8).to_bytes(1)
    # A CRC is linear: that of the whole frame changes by that of what changed, moved on over the body.
    changed = _crc(head, _CRC16) ^ _crc(frame[:body], _CRC16)
    crc = int.from_bytes(frame[-2:]) ^ _moved(changed, len(frame) - body - 2)
    return head + frame[body:-2] + crc.to_bytes(2)


def _coded(number: int) -> bytes:
    """A frame's number, coded as UTF-8 codes a character."""
    return chr(number).encode("utf-8", "surrogatepass")


def _crc(data: bytes, polynomial: int) -> int:
    bits = polynomial.bit_length() - 1
    return _remainder(int.from_bytes(data) << bits, polynomial)


def _remainder(value: int, polynomial: int) -> int:
    """Divide two polynomials over GF(2), one bit a coefficient."""
    while (surplus := value.bit_length() - polynomial.bit_length()) >= 0:
        value ^= polynomial << surplus
    return value


def _moved(crc: int, count: int) -> int:
    """The CRC-16 of what has this one, followed by `count` bytes of 0: its product with x to the power of 8 count."""
    for bit in range(count.bit_length()):
        if count >> bit & 1:
            crc = _product(crc, _power(bit))
    return crc


@cache
def _power(bit: int) -> int:
    """The polynomial x to the power of 8 times 2 to the power of `bit`, modulo the CRC-16's."""
    return _product(_power(bit - 1), _power(bit - 1)) if bit else 1 << 8


def _product(one: int, two: int) -> int:
    value = 0
    for bit in range(two.bit_length()):
        if two >> bit & 1:
            value ^= one << bit
    return _remainder(value, _CRC16)


class FlacEncoder:
    """An `Encoder`; STREAMINFO is the part of the header that the end changes.

    Audio that begins in mid-song, at `first_block`, keeps its place there. STREAMINFO stays open then: decoders take
    its number of samples for the place where the song ends.
    """

    def __init__(self, sample_rate: int, tags: SongTags, first_block: int) -> None:
        self._sample_rate, self._first, self._next = sample_rate, first_block, first_block
        self._rest = np.empty((0, _CHANNELS), np.int16)
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._samples = 0
        self.header = stream_header(sample_rate, tags)

    def encode(self, pcm: np.ndarray) -> bytes:
        """As `Encoder.encode`."""
        self._md5.update(np.ascontiguousarray(pcm, "<i2").data)
        self._samples += len(pcm)
        audio = np.concatenate([self._rest, pcm])
        blocks = len(audio) // BLOCK
        self._rest = audio[blocks * BLOCK :].copy()
        first, self._next = self._next, self._next + blocks
        return encode_blocks(audio[: blocks * BLOCK], first, self._sample_rate)

    def finish(self) -> tuple[bytes, bytes]:
        """As `Encoder.finish`."""
        end = encode_blocks(self._rest, self._next, self._sample_rate)
        if self._first:
            return end, self.header
        return end, finished_header(self.header, self._samples, self._md5.digest())

    def close(self) -> None:
        """As `Encoder.close`: there is nothing to let go of."""


def decode_part(header: bytes, frames: bytes) -> np.ndarray:
    """The samples of one piece, int16 ``[samples, 2]``; its frames may be numbered from anywhere.

    `header` is that of the stream. Raises `ObjectError` when either is damaged.
    """
    blocks = list(read_audio(BytesIO(header + frames)))
    if not blocks:
        raise ObjectError("the audio cannot be read: no frame")
    return np.concatenate(blocks)
