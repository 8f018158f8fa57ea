"""Ogg Vorbis."""

import numpy as np

from shared.audio.libsndfile import LibsndfileStream
from shared.audio.ogg_pages import OggRewriter
from shared.audio.tags import SongTags, vorbis_comment

_COMMENT_PACKET = b"\x03vorbis"
_HEADER_PACKETS = 3
_QUALITY = 0.6  # of 1; nominally 192 kbit/s


class OggEncoder:
    """An `Encoder`; `header` is empty, for no byte of its file ever changes: the first pages hold the tags."""

    header = b""

    def __init__(self, sample_rate: int, tags: SongTags) -> None:
        self._pages = OggRewriter(_COMMENT_PACKET + vorbis_comment(tags, framing=True), _HEADER_PACKETS)
        level = 1 - _QUALITY  # libsndfile counts the other way round
        self._stream = LibsndfileStream(sample_rate, "OGG", "VORBIS", level=level)

    def encode(self, pcm: np.ndarray) -> bytes:
        """As `Encoder.encode`."""
        return self._pages.rewritten(self._stream.encode(pcm))

    def finish(self) -> tuple[bytes, bytes]:
        """As `Encoder.finish`."""
        data, _ = self._stream.finish()
        return self._pages.rewritten(data), b""

    def close(self) -> None:
        """As `Encoder.close`."""
        self._stream.close()
