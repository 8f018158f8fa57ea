"""MP3: tags, then an info frame that says of a file that grows where its music begins, but not where it ends.

The info frame is the one that LAME writes: https://gabriel.mp3-tech.org/mp3infotag.html
"""

from functools import cache

import numpy as np

from shared.audio.libsndfile import LibsndfileStream
from shared.audio.tags import SongTags, id3

SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # Hz; ISO 11172-3, 13818-3, MPEG 2.5
_MARK = b"Xing"
_ALL_FIELDS, _SIZE_FIELD = 0xF, 0x2  # flags: frames, size, table of contents and quality; size alone
_UNKNOWN = 0x7FFFFFFF  # bytes: with none, FFmpeg takes the info frame for silence in the music
_LAME_OFFSET, _LAME_SIZE = 120, 36  # of the encoder's part, from the mark on, behind all fields
_PADDING, _TOTALS = 21, 28  # offsets in that part: 12 bits each of delay and padding; length and checksums


class Mp3Encoder:
    """An `Encoder`; the info frame is the part of the header that the end changes.

    FFmpeg and browsers play what a listener kept of a stream whole, from its first sample on. libsndfile takes it for
    as long as its size at a constant bit rate, and begins with the encoder's delay.
    """

    def __init__(self, sample_rate: int, tags: SongTags) -> None:
        self._tags = id3(tags)
        info = _growing_info(sample_rate)
        self._skip = len(info)  # bytes of the encoder's own frame, which is empty until the end
        self.header = self._tags + info
        self._stream = LibsndfileStream(sample_rate, "MP3")

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


@cache
def _growing_info(sample_rate: int) -> bytes:
    """The info frame of a file that grows: the encoder's delay is in it, the length of the music is left open."""
    trial = LibsndfileStream(sample_rate, "MP3")
    trial.encode(np.zeros((1, 2), np.int16))
    _, info = trial.finish()
    mark = info.find(_MARK)
    if mark < 0 or int.from_bytes(info[mark + 4 : mark + 8]) != _ALL_FIELDS:
        raise RuntimeError("this libsndfile writes no info frame into MP3 files")
    lame = bytearray(info[mark + _LAME_OFFSET : mark + _LAME_OFFSET + _LAME_SIZE])
    lame[_PADDING + 1] &= 0xF0
    lame[_PADDING + 2] = 0
    lame[_TOTALS:] = bytes(_LAME_SIZE - _TOTALS)
    fields = _SIZE_FIELD.to_bytes(4) + _UNKNOWN.to_bytes(4)
    return (info[:mark] + _MARK + fields + lame).ljust(len(info), b"\0")
