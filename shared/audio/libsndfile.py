"""libsndfile's encoders of MP3, Vorbis and Opus, whose bytes are taken while a song goes on."""

from io import SEEK_CUR, SEEK_END
from typing import Literal

import numpy as np
import soundfile

from shared.audio.pcm import FULL_SCALE


class _Sink:
    """A file to libsndfile, which appends to it, or writes its beginning anew when all is known."""

    def __init__(self) -> None:
        self._at = self._end = 0
        self.appended = bytearray()  # and not taken yet
        self.beginning = b""

    def write(self, data: bytes) -> int:
        if self._at == self._end:
            self.appended += data
        else:
            self.beginning = data
        self._at += len(data)
        self._end = max(self._at, self._end)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + {SEEK_CUR: self._at, SEEK_END: self._end}.get(whence, 0)
        return self._at

    def tell(self) -> int:
        return self._at


class LibsndfileStream:
    """One encoder from the first sample to the last, which is handed a second at a time, however audio comes in.

    The size of what it is handed matters: libvorbis looks at all of the first stretch to begin with, and encoders
    were seen to crash on whole songs.
    """

    def __init__(
        self,
        sample_rate: int,
        container: Literal["MP3", "OGG"],
        codec: Literal["MPEG_LAYER_III", "VORBIS", "OPUS"],
        channels: int = 2,
        level: float | None = None,
        mode: Literal["CONSTANT"] | None = None,
    ) -> None:
        """`level` is libsndfile's compression level, 0 to 1, and `mode` its bit rate mode; None for its defaults."""
        self._block = sample_rate
        self._rest = np.empty((0, channels), np.int16)
        self._sink = _Sink()
        self._file = soundfile.SoundFile(
            self._sink, "w", sample_rate, channels, codec, format=container, compression_level=level, bitrate_mode=mode
        )

    def encode(self, pcm: np.ndarray) -> bytes:
        """Take the next int16 ``[samples, channels]``; returns the bytes that the encoder made meanwhile."""
        audio = np.concatenate([self._rest, pcm])
        whole = len(audio) - len(audio) % self._block
        for start in range(0, whole, self._block):
            self._write(audio[start : start + self._block])
        self._rest = audio[whole:].copy()
        return self._taken()

    def _write(self, pcm: np.ndarray) -> None:
        self._file.write(pcm.astype(np.float32) / FULL_SCALE)  # libsndfile 1.2.2 makes noise of MP3 from whole numbers

    def _taken(self) -> bytes:
        taken = bytes(self._sink.appended)
        self._sink.appended.clear()
        return taken

    def finish(self) -> tuple[bytes, bytes]:
        """Return the last bytes, and those that take the place of the first ones, if any do."""
        self._write(self._rest)
        self.close()
        return self._taken(), self._sink.beginning

    def close(self) -> None:
        """Let go of the encoder."""
        self._file.close()
