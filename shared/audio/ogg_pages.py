"""Pages of an Ogg stream, RFC 3533: our comment header in place of the encoder's, and no random serial number."""

from io import BytesIO
from zlib import crc32

from mutagen.ogg import OggPage


class OggRewriter:
    """Rewrites the pages of one stream as they come; the same bytes make the same pages, however they are cut."""

    def __init__(self, comment: bytes, header_packets: int) -> None:
        """`comment` takes the place of the second one of `header_packets`."""
        self._comment, self._header_packets = comment, header_packets
        self._serial = crc32(comment)  # the song's seed is in it
        self._pending = b""  # bytes of a page that is not whole yet
        self._headers: list[OggPage] | None = []  # the encoder's own, until all are there
        self._added = 0  # pages, by which ours are more than the encoder's

    def rewritten(self, data: bytes) -> bytes:
        """Take the next bytes; returns the pages that are whole now."""
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
        if len(packets) < self._header_packets or not page.complete:
            return []
        identification, _, *others = packets
        first, *rest = self._headers
        assert first.packets == [identification], "the first page holds the first header alone"
        ours = OggPage.from_packets([self._comment, *others], sequence=1)
        self._added, self._headers = len(ours) - len(rest), None
        return [first, *ours]


def _page_size(data: bytes) -> int | None:
    """Bytes of the page that begins here, None where it is not whole; RFC 3533, section 6."""
    if len(data) < 27 or len(data) < 27 + data[26]:
        return None
    size = 27 + data[26] + sum(data[27 : 27 + data[26]])
    return size if len(data) >= size else None
