"""The web page: a handful of files, read once, served with a strict policy."""

import mimetypes
from collections.abc import Collection
from pathlib import Path
from typing import Any

from litestar import Request, Response

from services.gateway.problems import Refusal
from services.gateway.ranges import tag_matches, tag_of

STATIC = Path(__file__).with_name("static")
POLICY = "; ".join(
    ("default-src 'self'", "base-uri 'none'", "form-action 'self'", "frame-ancestors 'none'", "object-src 'none'")
)
_TYPES = {  # the machine's own table may say otherwise, or nothing; Litestar adds the charset to text
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


class Pages:
    """Static files by their path below the folder. Nothing outside of it can be named."""

    def __init__(self, folder: Path = STATIC, only: Collection[str] = ()) -> None:
        """`only` names the files, if not all are meant."""
        self._files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and (not only or path.relative_to(folder).as_posix() in only)
        }
        self._tags = {name: tag_of(data) for name, data in self._files.items()}

    def answer(self, request: Request[Any, Any, Any], name: str, policy: str = POLICY) -> Response[bytes]:
        """A file, or 304 when the client has it. Raises a 404 `Refusal`."""
        if name not in self._files:
            raise Refusal(404, "not-found", "there is no such file")
        headers = {
            "ETag": self._tags[name],
            "Cache-Control": "no-cache",
            "Content-Security-Policy": policy,
        }
        if tag_matches(request.headers.get("if-none-match", ""), self._tags[name]):
            return Response(b"", status_code=304, headers=headers, media_type=_media_type(name))
        return Response(self._files[name], headers=headers, media_type=_media_type(name))


def _media_type(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
