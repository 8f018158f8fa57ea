"""MP3: tags, then an info frame that says of a file that grows where its music begins, but not where it ends.

The info frame is the one that LAME writes: https://gabriel.mp3-tech.org/mp3infotag.html
"""

from functools import cache

import numpy as np

from shared.audio.forms import MP3_BIT_RATES
from shared.audio.libsndfile import LibsndfileStream
from shared.audio.tags import SongTags, id3

_MARKS = {False: b"Xing", True: b"Info"}  # by whether the bit rate is constant
_ALL_FIELDS, _SIZE_FIELD = 0xF, 0x2  # flags: frames, size, table of contents and quality; size alone
_UNKNOWN = 0x7FFFFFFF  # bytes: with none, FFmpeg takes the info frame for silence in the music
_LAME_OFFSET, _LAME_SIZE = 120, 36  # of the encoder's part, from the mark on, behind all fields
_LEAST_LEVEL = 0.9999  # libsndfile's lowest bit rate: it refuses 1
_PADDING, _TOTALS = 21, 28  # offsets in that part: 12 bits each of delay and padding; length and checksums


class Mp3Encoder:
    """An `Encoder`; the info frame is the part of the header that the end changes.

    FFmpeg and browsers play what a listener kept of a stream whole, from its first sample on. libsndfile takes it for
    as long as its size at a constant bit rate, and begins with the encoder's delay.
    """

    def __init__(
        self, sample_rate: int, tags: SongTags, channels: int = 2, constant_bit_rate: int | None = None
    ) -> None:
        """`constant_bit_rate` in kbit/s, one of `MP3_BIT_RATES`; without one it varies."""
        self._tags = id3(tags)
        info = _growing_info(sample_rate, channels, constant_bit_rate)
        self._skip = len(info)  # bytes of the encoder's own frame, which is empty until the end
        self.header = self._tags + info
        self._stream = _stream(sample_rate, channels, constant_bit_rate)

    def encode(self, pcm: np.ndarray) -> bytes:
        """As `Encoder.encode`."""
        return self._behind_info(self._stream.encode(pcm))

    def _behind_info(self, data: bytes) -> bytes:
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        return data[skipped:]

    def finish(self) -> tuple[bytes, bytes]:
        """As `Encoder.finish`."""
        data, info = self._stream.finish()
        return self._behind_info(data), self._tags + info

    def close(self) -> None:
        """As `Encoder.close`."""
        self._stream.close()


def _stream(sample_rate: int, channels: int, bit_rate: int | None) -> LibsndfileStream:
    if bit_rate is None:
        return LibsndfileStream(sample_rate, "MP3", "MPEG_LAYER_III", channels)
    least, *_, most = MP3_BIT_RATES[sample_rate]
    level = min((most - bit_rate) / (most - least), _LEAST_LEVEL)
    return LibsndfileStream(sample_rate, "MP3", "MPEG_LAYER_III", channels, level, "CONSTANT")


@cache
def _growing_info(sample_rate: int, channels: int, bit_rate: int | None) -> bytes:
    """The info frame of a file that grows: the encoder's delay is in it, the length of the music is left open.

    Empty for the lowest constant bit rates.
    """
    trial = _stream(sample_rate, channels, bit_rate)
    trial.encode(np.zeros((1, channels), np.int16))
    _, info = trial.finish()
    if not info and bit_rate is not None:
        return b""  # it has no room in a frame of this size, and a decoder begins with the encoder's delay
    named = _MARKS[bit_rate is not None]
    mark = info.find(named)
    if mark < 0 or int.from_bytes(info[mark + 4 : mark + 8]) != _ALL_FIELDS:
        raise RuntimeError("this libsndfile writes no info frame into MP3 files")
    lame = bytearray(info[mark + _LAME_OFFSET : mark + _LAME_OFFSET + _LAME_SIZE])
    lame[_PADDING + 1] &= 0xF0
    lame[_PADDING + 2] = 0
    lame[_TOTALS:] = bytes(_LAME_SIZE - _TOTALS)
    fields = _SIZE_FIELD.to_bytes(4) + _UNKNOWN.to_bytes(4)
    return (info[:mark] + named + fields + lame).ljust(len(info), b"\0")
