"""Where audio is saved while it grows: a file, or standard output."""

import asyncio
import os
import select
import sys
from pathlib import Path
from typing import Self


class FileOutput:
    """A file that can be played while it grows: nothing is buffered, and it has its name from the beginning."""

    def __init__(self, path: Path) -> None:
        """`path` is created, or replaced. Raises `OSError`."""
        self._file = path.open("wb", buffering=0)

    async def __aenter__(self) -> Self:
        """Return the output."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    async def write(self, block: bytes) -> None:
        """Append audio. A disk is faster than the network: a thread is not worth it. Raises `OSError`."""
        left = memoryview(block)
        while left:
            left = left[self._file.write(left) :]


class StandardOutput:
    """Audio for another program. A reader that takes its time does not keep Ctrl-C from being seen."""

    async def __aenter__(self) -> Self:
        """Return the output."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Do nothing: the process closes it at its end."""

    async def write(self, block: bytes) -> None:
        """Write audio. Raises `BrokenPipeError` where the reader has gone."""
        descriptor = sys.stdout.fileno()
        left = memoryview(block)
        while left:
            await _writable(descriptor)
            left = left[os.write(descriptor, left[: select.PIPE_BUF]) :]  # what a pipe that is writable has room for


async def _writable(descriptor: int) -> None:
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        loop.add_writer(descriptor, ready.set)
    except PermissionError:  # a file, which cannot be waited for and need not be
        return
    try:
        await ready.wait()
    finally:
        loop.remove_writer(descriptor)
