"""Ogg Vorbis: our comment header in place of the encoder's, and a serial number that is not random."""

from io import BytesIO
from zlib import crc32

import numpy as np
from mutagen.ogg import OggPage

from shared.audio.libsndfile import LibsndfileStream
from shared.audio.tags import SongTags, vorbis_comment

_COMMENT_PACKET = b"\x03vorbis"
_QUALITY = 0.6  # of 1; nominally 192 kbit/s


class OggEncoder:
    """An `Encoder`; `header` is empty, for no byte of its file ever changes: the first pages hold the tags."""

    header = b""

    def __init__(self, sample_rate: int, tags: SongTags) -> None:
        self._comment = _COMMENT_PACKET + vorbis_comment(tags, framing=True)
        self._serial = crc32(self._comment)  # the song's seed is in it
        self._stream = LibsndfileStream(sample_rate, "OGG", 1 - _QUALITY)  # libsndfile counts the other way round
        self._pending = b""  # bytes of a page that is not whole yet
        self._headers: list[OggPage] | None = []  # the encoder's own, until all are there
        self._added = 0  # pages, by which ours are more than the encoder's

    def encode(self, pcm: np.ndarray) -> bytes:
        """As `Encoder.encode`."""
        return self._rewritten(self._stream.encode(pcm))

    def finish(self) -> tuple[bytes, bytes]:
        """As `Encoder.finish`."""
        data, _ = self._stream.finish()
        return self._rewritten(data), b""

    def close(self) -> None:
        """As `Encoder.close`."""
        self._stream.close()

    def _rewritten(self, data: bytes) -> bytes:
        """The pages that are whole now."""
        self._pending += data
        pages = []
        while (size := _page_size(self._pending)) is not None:
            page = OggPage(BytesIO(self._pending[:size]))
            self._pending = self._pending[size:]
            pages += self._page(page)
        for page in pages:
            page.serial = self._serial
        return b"".join(page.write() for page in pages)

    def _page(self, page: OggPage) -> list[OggPage]:
        """The pages to be written for one of the encoder's."""
        if self._headers is None:
            page.sequence += self._added
            return [page]
        self._headers.append(page)
        packets = OggPage.to_packets(self._headers)
        if len(packets) < 3 or not page.complete:
            return []
        identification, _, setup = packets
        first, *rest = self._headers
        assert first.packets == [identification], "the first page holds the first header alone"
        ours = OggPage.from_packets([self._comment, setup], sequence=1)
        self._added, self._headers = len(ours) - len(rest), None
        return [first, *ours]


def _page_size(data: bytes) -> int | None:
    """Bytes of the page that begins here, None where it is not whole; RFC 3533, section 6."""
    if len(data) < 27 or len(data) < 27 + data[26]:
        return None
    size = 27 + data[26] + sum(data[27 : 27 + data[26]])
    return size if len(data) >= size else None
