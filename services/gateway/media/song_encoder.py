"""Writes a song's audio in another format, or from one of its seconds on, while the song grows. Works in threads."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from shared.audio.files import AudioWriter
from shared.audio.flac import BLOCK
from shared.audio.forms import Form
from shared.audio.reading import read_audio, sample_rate_of
from shared.audio.tags import SongTags
from shared.schema.request import GenerateRequest

_BLOCKS = 5  # of a second: after as many, other encodings have a turn


class Stopped(Exception):
    """The audio is not needed any more."""


class SongEncoder:
    """Writes one file from the pieces of a song. It begins at the FLAC block that holds the second `start`."""

    def __init__(
        self, path: Path, form: Form, request: GenerateRequest, start: float, grown: Callable[[int, float], None]
    ) -> None:
        """`grown` is called from the thread: bytes of the file, and the second of the song that they reach."""
        self._path, self._form, self._tags, self._start = path, form, SongTags.of(request), start
        self._grown = grown
        self._writer: AudioWriter | None = None
        self._open = contextlib.ExitStack()
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._at = 0  # samples a channel of the song that were read or passed over
        self._rate = 0
        self._blocks: Iterator[np.ndarray] = iter(())  # of the file that was begun

    def first_sample(self, rate: int) -> int:
        """The sample at which the audio begins."""
        return int(self._start * rate) // BLOCK * BLOCK

    def pass_over(self, samples: int) -> None:
        """Leave out everything before a sample of the song, which is not after the first one."""
        self._at = samples

    def begin(self, piece: Path) -> None:
        """Take a file that has the next audio. Raises `ObjectError` when it is damaged."""
        with self._lock:
            self._rate = sample_rate_of(piece)
            self._blocks = read_audio(piece)

    def go_on(self) -> bool:
        """Write some seconds of the file that was begun; returns whether there may be more of it.

        Raises `ObjectError` when it is damaged, `OSError` for a full disk.
        """
        with self._lock:
            first, count = self.first_sample(self._rate), 0
            for block in itertools.islice(self._blocks, _BLOCKS):
                if self._stopped.is_set():
                    raise Stopped
                count += 1
                heard = block[max(0, first - self._at) :]
                self._at += len(block)
                if len(heard):
                    self._write(heard, first)
            return count == _BLOCKS

    def _write(self, audio: np.ndarray, first: int) -> None:
        if self._writer is None:
            writer = AudioWriter(self._path, self._form, self._rate, self._tags, first_block=first // BLOCK)
            self._writer = self._open.enter_context(writer)
        self._writer.write(audio)
        self._tell()

    def _tell(self) -> None:
        self._grown(self._path.stat().st_size, self._at / self._rate)

    def finish(self) -> None:
        """Finish the file, if there was audio for it. Raises `OSError` for a full disk."""
        with self._lock:
            self._open.close()
            if self._writer is not None:
                self._tell()

    def stop(self) -> None:
        """End what another thread is doing; never waits."""
        self._stopped.set()

    def abandon(self) -> None:
        """Close the file as it is."""
        with self._lock, contextlib.suppress(Stopped), self._open:
            self._blocks = iter(())
            raise Stopped
