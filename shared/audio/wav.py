"""WAV: the tags before the audio, so that a file that grows is a stream."""

import numpy as np

from shared.audio.tags import SongTags, id3

_UNKNOWN = 0xFFFFFFFF  # the size of a file that grows: players play to its end
_PCM, _CHANNELS, _SAMPLE_BYTES = 1, 2, 2


class WavEncoder:
    """An `Encoder`: of the header only the two sizes are known at the end."""

    def __init__(self, sample_rate: int, tags: SongTags) -> None:
        frame = _CHANNELS * _SAMPLE_BYTES
        form = b"".join(
            value.to_bytes(size, "little")
            for value, size in (
                (_PCM, 2),
                (_CHANNELS, 2),
                (sample_rate, 4),
                (sample_rate * frame, 4),  # bytes a second
                (frame, 2),
                (8 * _SAMPLE_BYTES, 2),
            )
        )
        self._chunks = b"WAVE" + _chunk(b"fmt ", form) + _chunk(b"id3 ", id3(tags))
        self._size = 0  # bytes of audio
        self.header = self._header(_UNKNOWN, _UNKNOWN)

    def _header(self, file_size: int, audio_size: int) -> bytes:
        return b"".join(
            (b"RIFF", file_size.to_bytes(4, "little"), self._chunks, b"data", audio_size.to_bytes(4, "little"))
        )

    def encode(self, pcm: np.ndarray) -> bytes:
        """As `Encoder.encode`."""
        self._size += pcm.nbytes
        return pcm.astype("<i2").tobytes()

    def finish(self) -> tuple[bytes, bytes]:
        """As `Encoder.finish`."""
        return b"", self._header(len(self.header) - 8 + self._size, self._size)

    def close(self) -> None:
        """As `Encoder.close`: there is nothing to let go of."""


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)  # chunks begin at even bytes
