"""Conditional and range requests of RFC 9110, as far as seeking in audio needs them: byte ranges and entity tags."""

import hashlib
import re
from dataclasses import dataclass

_RANGE = re.compile(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", re.IGNORECASE | re.ASCII)
_TAG = re.compile(r'(?:W/)?("[^"]*")')


@dataclass(frozen=True)
class ByteRange:
    """Bytes `first` to `last`, both included."""

    first: int
    last: int

    @property
    def length(self) -> int:
        """The number of bytes."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Conditions:
    """The headers of a request about the part and the version that it wants; None for a missing header."""

    method: str
    if_none_match: str | None = None
    range: str | None = None
    if_range: str | None = None


class NotSatisfiable(Exception):
    """The requested range lies outside of the content."""


def parse_range(header: str, size: int) -> ByteRange | None:
    """Parse a Range header for `size` bytes; None where it is to be ignored, as it is with several ranges.

    Raises `NotSatisfiable`.
    """
    found = _RANGE.fullmatch(header)
    if not found or len(header) > 100 or not (found[1] or found[2]):
        return None
    if not found[1]:
        length = min(int(found[2]), size)
        if length == 0:
            raise NotSatisfiable
        return ByteRange(size - length, size - 1)
    first = int(found[1])
    last = min(int(found[2]), size - 1) if found[2] else size - 1
    if found[2] and int(found[2]) < first:
        return None
    if first >= size:
        raise NotSatisfiable
    return ByteRange(first, last)


def parse_growing_range(header: str) -> tuple[int, int | None] | None:
    """Parse a Range header for content that still grows: first byte, and last where it is named.

    None where it is to be ignored: several ranges, the last bytes of content without an end, and all of the content, as
    ffmpeg asks for it, which reads nothing of a part whose length is not known.
    """
    found = _RANGE.fullmatch(header)
    if not found or len(header) > 100 or not found[1]:
        return None
    first, last = int(found[1]), int(found[2]) if found[2] else None
    ignored = (first, last) == (0, None) or (last is not None and last < first)
    return None if ignored else (first, last)


def tag_matches(header: str, etag: str) -> bool:
    """Whether an If-None-Match header names the tag."""
    return header.strip() == "*" or etag in _TAG.findall(header)


def tag_of(data: bytes) -> str:
    """Make a strong entity tag of an answer's body."""
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'
