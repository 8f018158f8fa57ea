"""Saving a song: into a file beside the one that is wanted, resumed after a lost connection, renamed when complete."""

import asyncio
import itertools
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

import httpx

from services.client.errors import UnexpectedAnswer, Unreachable, cause, problem

log = logging.getLogger(__name__)


class _Target:
    """Where a song goes, as its first answer tells."""

    def __init__(self, answer: httpx.Response, job_id: str, path: Path | None) -> None:
        self.etag = answer.headers.get("etag", "")
        self.size = int(answer.headers.get("content-length", -1))
        self.path = _choose(path, _file_name(answer) or job_id)
        # The tag is in the name: what is left of another song's download is never gone on with.
        tag = re.sub(r"[^0-9A-Za-z-]", "", self.etag)[:80] or job_id
        self.part = self.path.with_name(f"{self.path.name}.{tag}.part")

    @property
    def have(self) -> int:
        """Bytes that are there already."""
        return self.part.stat().st_size if self.part.exists() else 0


async def fetch(
    http: httpx.AsyncClient,
    url: str,
    job_id: str,
    path: Path | None,
    on_progress: Callable[[int, int], None] | None,
    pauses: Sequence[float],
) -> Path:
    """Save what is at `url`; returns the file.

    `path` is a file, which is replaced, and given the service's ending if it has none; or a folder, or None for the
    present one, where the file gets the name that the service gave it and replaces no other. Until it is complete it
    is called ``….part``. A lost connection is resumed, and so is what an earlier call left. `on_progress` is told bytes
    and their total. `pauses` are the seconds before each try in a row that brings nothing.
    Raises a `ClientError`, and `OSError` where the file cannot be written.
    """
    target: _Target | None = None
    fruitless = 0
    while True:
        have = target.have if target else 0
        headers = {"Accept-Encoding": "identity"}
        if target and have:
            headers |= {"Range": f"bytes={have}-", "If-Range": target.etag}
        try:
            async with http.stream("GET", url, headers=headers) as answer:
                if answer.status_code >= 400:
                    await answer.aread()
                    raise problem(answer)
                if target is None:
                    target = _Target(answer, job_id, path)
                    if 0 < target.have < target.size and target.etag:
                        continue  # ask for the rest
                await _write(answer, target, on_progress)
            break
        except httpx.TransportError as error:
            fruitless = 0 if target and target.have > have else fruitless + 1
            if fruitless > len(pauses):
                raise Unreachable(f"the connection was lost: {cause(error)}") from error
            pause = pauses[max(0, fruitless - 1)]
            log.warning("the connection was lost; going on in %g s", pause)
            await asyncio.sleep(pause)
    if target.size >= 0 and target.have != target.size:
        target.part.unlink()
        raise UnexpectedAnswer(f"the audio has {target.size} bytes, but other ones came; try again")
    os.replace(target.part, target.path)
    return target.path


async def _write(answer: httpx.Response, target: _Target, on_progress: Callable[[int, int], None] | None) -> None:
    resumed = answer.status_code == 206
    done = target.have if resumed else 0
    # A disk is quicker than the network, and blocks are small: not worth a thread.
    with target.part.open("ab" if resumed else "wb") as file:
        async for block in answer.aiter_bytes(1 << 16):
            file.write(block)
            done += len(block)
            if on_progress:
                on_progress(done, target.size)


def _choose(path: Path | None, name: str) -> Path:
    if path is not None and not path.is_dir():
        return path if path.suffix else path.with_name(path.name + Path(name).suffix)
    found = (path or Path()) / name
    if not found.exists():
        return found
    free = (found.with_stem(f"{found.stem}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in free if not candidate.exists())


def _file_name(answer: httpx.Response) -> str | None:
    """The name that the service gave the file, without any folder (RFC 6266: the encoded one goes first)."""
    header = answer.headers.get("content-disposition", "")
    if encoded := re.search(r"filename\*=UTF-8''([^;\s]+)", header, re.IGNORECASE):
        name = unquote(encoded[1])
    elif plain := re.search(r'filename="([^"]+)"', header):
        name = plain[1]
    else:
        return None
    name = Path(name.replace("\\", "/")).name
    return None if name in ("", ".", "..") else name
