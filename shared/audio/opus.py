"""Opus in Ogg, RFC 7845."""

import numpy as np

from shared.audio.forms import OPUS_BIT_RATES
from shared.audio.libsndfile import LibsndfileStream
from shared.audio.ogg_pages import OggRewriter
from shared.audio.tags import SongTags, vorbis_comment

_COMMENT_PACKET = b"OpusTags"
_HEADER_PACKETS = 2


class OpusEncoder:
    """An `Encoder`; `header` is empty, for no byte of its file ever changes: the first pages hold the tags."""

    header = b""

    def __init__(self, sample_rate: int, tags: SongTags, channels: int, bit_rate: int | None) -> None:
        """`bit_rate` in kbit/s, of all channels; see `Form`."""
        self._pages = OggRewriter(_COMMENT_PACKET + vorbis_comment(tags, framing=False), _HEADER_PACKETS)
        level = None if bit_rate is None else _level(bit_rate / channels)
        self._stream = LibsndfileStream(sample_rate, "OGG", "OPUS", channels, level)

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


def _level(bit_rate: float) -> float:
    """libsndfile's compression level for a channel of so many kbit/s: from 0 for the most to 1 for the least."""
    least, most = OPUS_BIT_RATES
    return (most - bit_rate) / (most - least)
