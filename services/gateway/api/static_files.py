"""Static files: the files of the web page, read and compressed once, served with a strict content policy."""

import functools
import gzip
import mimetypes
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from litestar import Request, Response

from services.gateway.api.conditional import tag_matches, tag_of
from services.gateway.errors import ApiError

STATIC = Path(__file__).parents[1] / "static"
POLICY = "; ".join(
    ("default-src 'self'", "base-uri 'none'", "form-action 'self'", "frame-ancestors 'none'", "object-src 'none'")
)
_TYPES = {  # the table of the operating system may differ; Litestar adds the charset to text
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".ico": "image/x-icon",
    ".txt": "text/plain",
    ".woff2": "font/woff2",
}
_COMPRESSED = {"application/json", "image/svg+xml"}  # beside text


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding header allows gzip."""
    found = {}
    for part in header.lower().split(","):
        name, _, rest = part.partition(";")
        weight = rest.strip().removeprefix("q=")
        try:
            found[name.strip()] = float(weight) > 0 if weight else True
        except ValueError:
            continue
    return found.get("gzip", found.get("*", False))


class StaticFile:
    """A response body that is the same for every client; text is compressed once, for the first who asks.

    A body that holds secrets beside a client's input must not be served like this: its compressed length would give
    them away.
    """

    def __init__(self, data: bytes, media_type: str) -> None:
        self._data, self._media_type = data, media_type

    @functools.cached_property
    def _forms(self) -> dict[str, tuple[bytes, str]]:
        """The body and its entity tag, by content encoding."""
        forms = {"": (self._data, tag_of(self._data))}
        if self._media_type.startswith("text/") or self._media_type in _COMPRESSED:
            small = gzip.compress(self._data, mtime=0)
            if len(small) < len(self._data):
                forms["gzip"] = small, tag_of(small)
        return forms

    def response(self, request: Request[Any, Any, Any], headers: Mapping[str, str] | None = None) -> Response[bytes]:
        """Respond with the file, compressed where the client accepts that, or with 304 where it has it already."""
        small = "gzip" in self._forms and accepts_gzip(request.headers.get("accept-encoding", ""))
        data, tag = self._forms["gzip" if small else ""]
        found = {"ETag": tag, "Cache-Control": "no-cache", **(headers or {})}
        if "gzip" in self._forms:
            found["Vary"] = "Accept-Encoding"
        if tag_matches(request.headers.get("if-none-match", ""), tag):
            return Response(b"", status_code=304, headers=found, media_type=self._media_type)
        if small:
            found["Content-Encoding"] = "gzip"
        return Response(data, headers=found, media_type=self._media_type)


class StaticFiles:
    """The files of a folder by their path below it. No path leads outside of it."""

    def __init__(self, folder: Path = STATIC, only: Collection[str] = ()) -> None:
        """Read the files of `folder`: those named by `only`, or else all."""
        self._files = {
            path.relative_to(folder).as_posix(): StaticFile(path.read_bytes(), _media_type(path.name))
            for path in sorted(folder.rglob("*"))
            if path.is_file() and (not only or path.relative_to(folder).as_posix() in only)
        }

    def response(self, request: Request[Any, Any, Any], name: str, policy: str = POLICY) -> Response[bytes]:
        """Respond with a file, or with 304 where the client has it already. Raises a 404 `ApiError`."""
        if name not in self._files:
            raise ApiError(404, "not-found", "there is no such file")
        return self._files[name].response(request, {"Content-Security-Policy": policy})


def _media_type(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
