"""Download of a song: into a partial file, resumed after a lost connection, renamed when complete."""

import asyncio
import itertools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import httpx

from heartmula_client.errors import UnexpectedAnswer, Unreachable, cause, error_from
from heartmula_client.retries import RETRY_WAITS

log = logging.getLogger(__name__)

MAX_HEADER = 1 << 20  # bytes; lyrics in it are the most


class _Target:
    """Files and size of a download, from the headers of its first answer."""

    def __init__(self, answer: httpx.Response, job_id: str, path: Path | None) -> None:
        self.etag = answer.headers.get("etag", "")
        self.size = int(answer.headers.get("content-length", -1))
        self.path = choose_path(path, file_name(answer) or job_id)
        # The ETag is in the name, so that a download never resumes a part of other audio.
        tag = re.sub(r"[^0-9A-Za-z-]", "", self.etag)[:80] or job_id
        self.part = self.path.with_name(f"{self.path.name}.{tag}.part")

    @property
    def received(self) -> int:
        """Bytes in the partial file."""
        return self.part.stat().st_size if self.part.exists() else 0


async def fetch(
    http: httpx.AsyncClient,
    url: str,
    job_id: str,
    path: Path | None,
    on_progress: Callable[[int, int], None] | None,
) -> Path:
    """Save the audio at `url`; returns the file.

    `path` is a file, which is replaced, and gets the service's suffix if it has none; or a folder, or None for the
    current one, where the file gets the name that the service gave it and replaces no other. Until it is complete its
    name ends with ``.part``. A lost connection is resumed, and so is a partial file of an earlier call. `on_progress`
    is called with the received and the total bytes. After a fourth attempt in a row that receives nothing, the download
    fails.
    Raises a `ClientError`, and `OSError` where the file cannot be written.
    """
    target: _Target | None = None
    failures = 0
    while True:
        received = target.received if target else 0
        headers = {"Accept-Encoding": "identity"}
        if target and received:
            headers |= {"Range": f"bytes={received}-", "If-Range": target.etag}
        try:
            async with http.stream("GET", url, headers=headers) as answer:
                if answer.status_code >= 400:
                    await answer.aread()
                    raise error_from(answer)
                if target is None:
                    target = _Target(answer, job_id, path)
                    if 0 < target.received < target.size and target.etag:
                        continue  # ask for the rest
                await _write(answer, target, on_progress)
            break
        except httpx.TransportError as error:
            failures = 0 if target and target.received > received else failures + 1
            if failures > len(RETRY_WAITS):
                raise Unreachable(f"the connection was lost: {cause(error)}") from error
            wait = RETRY_WAITS[max(0, failures - 1)]
            log.warning("the connection was lost; going on in %g s", wait)
            await asyncio.sleep(wait)
    if target.size >= 0 and target.received != target.size:
        target.part.unlink()
        raise UnexpectedAnswer(f"the audio has {target.size} bytes, but other ones came; try again")
    os.replace(target.part, target.path)
    return target.path


def put_header(answer: httpx.Response, path: Path) -> bool:
    """Write the finished song's first bytes, which `answer` has, over those of a file that was saved while it grew.

    Returns whether that was done: the two have to be of one size.
    """
    if answer.headers.get("content-range") != f"bytes 0-{len(answer.content) - 1}/{path.stat().st_size}":
        return False
    with path.open("r+b") as file:
        file.write(answer.content)
    return True


async def _write(answer: httpx.Response, target: _Target, on_progress: Callable[[int, int], None] | None) -> None:
    resumed = answer.status_code == 206
    done = target.received if resumed else 0
    # Blocks are small and a disk is faster than the network: a thread is not worth it.
    with target.part.open("ab" if resumed else "wb") as file:
        async for block in answer.aiter_bytes(1 << 16):
            file.write(block)
            done += len(block)
            if on_progress:
                on_progress(done, target.size)


def choose_path(path: Path | None, name: str) -> Path:
    """Return the file for `path`, as `fetch` describes it; `name` is the service's."""
    if path is not None and not path.is_dir():
        return path if path.suffix else path.with_name(path.name + Path(name).suffix)
    found = (path or Path()) / name
    if not found.exists():
        return found
    free = (found.with_stem(f"{found.stem}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in free if not candidate.exists())


def file_name(answer: httpx.Response) -> str | None:
    """Return the service's name for the file, without folders (RFC 6266: the encoded name takes precedence)."""
    header = answer.headers.get("content-disposition", "")
    if encoded := re.search(r"filename\*=UTF-8''([^;\s]+)", header, re.IGNORECASE):
        name = unquote(encoded[1])
    elif plain := re.search(r'filename="([^"]+)"', header):
        name = plain[1]
    else:
        return None
    name = Path(name.replace("\\", "/")).name
    return None if name in ("", ".", "..") else name
