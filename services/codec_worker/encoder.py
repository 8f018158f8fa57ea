"""Encoding of a song in a thread of its own, while the engine's thread decodes on."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from shared.audio.files import AudioWriter, SongTags
from shared.audio.peaks import Peaks
from shared.schema.request import AudioFormat

QUEUE = 4  # stretches of audio that may wait: four megabytes, and a moment's work at the end of a song


class Encoder:
    """Writes audio to a file and gathers its peaks; made by `encoding`. Its methods belong to one thread."""

    def __init__(self, writer: AudioWriter, peaks: Peaks, pool: ThreadPoolExecutor) -> None:
        self._writer, self._peaks, self._pool = writer, peaks, pool
        self._waiting: deque[Future[None]] = deque()
        self.samples = 0  # a channel, that were handed in

    def write(self, audio: np.ndarray) -> None:
        """Hand in the next stretch, float32 ``[samples, 2]``, which must not change from then on.

        Waits while `QUEUE` stretches wait. Raises what went wrong with any stretch before, as `AudioWriter.write`.
        """
        while self._waiting and (self._waiting[0].done() or len(self._waiting) == QUEUE):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._encode, audio))
        self.samples += len(audio)

    def finish(self) -> bytes:
        """Wait until everything is encoded; returns the peaks as they are stored. Raises as `write`."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._peaks.json()

    def _encode(self, audio: np.ndarray) -> None:
        self._writer.write(audio)
        self._peaks.add(audio)


@contextmanager
def encoding(path: Path, audio_format: AudioFormat, sample_rate: int, tags: SongTags) -> Iterator[Encoder]:
    """Encode what the body hands to the `Encoder` into a file, which is closed with the body, its thread ended.

    The body calls `Encoder.finish` last. When it raises, what waits is not encoded, and the file is worth nothing.
    """
    with AudioWriter(path, audio_format, sample_rate, tags) as writer:
        pool = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        try:
            yield Encoder(writer, Peaks(sample_rate), pool)
        finally:
            pool.shutdown(cancel_futures=True)
