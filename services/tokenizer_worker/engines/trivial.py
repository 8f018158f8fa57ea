"""A token engine without a model: frames from a random generator. For testing the flow of jobs."""

import time

import numpy as np

from services.tokenizer_worker.engines.base import Song, check_frames
from shared.model.sizes import TrivialSizes

CODEBOOKS, CODES = 8, 64


class TrivialEngine:
    """Makes `max_frames` frames that follow from the seed alone, at a settable pace. No song ends before.

    A step takes `step_ms` however many songs are in the batch, as on a GPU; moving to the device or back takes
    `swap_ms`.
    """

    notes: tuple[str, ...] = ()
    weight_bytes = TrivialSizes.LANGUAGE_MODEL

    def __init__(self, step_ms: int, slots: int = 1, *, swap_ms: int = 0) -> None:
        self.slots = slots
        self._pause, self._swap = step_ms / 1000, swap_ms / 1000
        self._songs: dict[str, tuple[Song, int]] = {}

    def song_bytes(self, song: Song) -> int:
        """Return a kilobyte for each frame."""
        return TrivialSizes.FRAME * song.max_frames

    def load(self) -> None:
        """Read nothing: there are no weights."""

    def to_device(self) -> None:
        """Move nothing: there are no weights. It takes its time."""
        time.sleep(self._swap)

    def to_host(self) -> None:
        """Forget the songs."""
        self._songs.clear()
        time.sleep(self._swap)

    def admit(self, song_id: str, song: Song, frames: np.ndarray | None = None) -> None:
        """Begin a song, or go on with it: a frame needs no frame before it."""
        if song_id in self._songs or len(self._songs) == self.slots:
            raise ValueError(f"no slot for song {song_id}: {', '.join(self._songs)} of {self.slots} in the batch")
        if frames is not None:
            check_frames(frames, CODEBOOKS, CODES)
        self._songs[song_id] = (song, 0 if frames is None else frames.shape[1])

    def step(self) -> dict[str, np.ndarray | None]:
        """Make the next frame of every song."""
        time.sleep(self._pause)
        made: dict[str, np.ndarray | None] = {}
        for song_id, (song, done) in list(self._songs.items()):
            if done >= song.max_frames:
                made[song_id] = None
                del self._songs[song_id]
            else:
                random = np.random.default_rng((song.seed, done))
                made[song_id] = random.integers(0, CODES, CODEBOOKS, dtype=np.int16)
                self._songs[song_id] = (song, done + 1)
        return made

    def drop(self, song_id: str) -> None:
        """Forget a song."""
        self._songs.pop(song_id, None)

    def park(self, song_id: str, frames: np.ndarray) -> None:
        """Forget a song: there are no caches to keep."""
        self.drop(song_id)

    def expire(self) -> None:
        """Keep nothing, so free nothing."""
