"""KV caches of paused songs, kept in host memory until the songs come back."""

import logging
import mmap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.tokenizer_worker.engines.base import PARKED_SECONDS, Song
from services.tokenizer_worker.engines.prefill import begins_alike
from services.tokenizer_worker.model import KVCache
from shared.model.checkpoint import Flavor
from shared.model.weights import page_lock
from shared.worker.metrics import PARKED_BYTES

log = logging.getLogger(__name__)

# Positions of a song with guidance that a chunk holds; of a song without, twice as many.
_POSITIONS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class _Parked:
    """The used part of a song's cache."""

    song: Song
    frames: np.ndarray  # int16 [codebooks, T]
    begun: np.ndarray  # the first of them, with which the cache was prefilled
    chunks: list[Tensor]
    until: float  # monotonic

    @property
    def used(self) -> int:
        """Positions of the cache that are kept."""
        return self.song.prompt.length + int(self.frames.shape[1]) - 1


class ParkedCaches:
    """Caches of paused songs, each with the song and the frames that it belongs to.

    What a cache holds follows from the song and its frames alone. So these are compared whole, which says more than the
    song's id and the fencing token of the turn that saved the frames: a copy is never used with other frames, and is
    used whenever they are equal, in whatever turn they were saved.

    Host memory is taken in chunks of one size, which any song can use; those that become free are kept for the next
    pause, because page-locking takes longer than copying. They are mapped, not allocated: so they are whole pages,
    counted by the control group, and go back to the system. All methods belong to the engine's thread.
    """

    def __init__(self, flavor: Flavor, dtype: torch.dtype, device: torch.device, spare: Callable[[], int]) -> None:
        """`spare` returns the bytes of host memory that may still be taken."""
        self._dtype, self._device, self._spare = dtype, device, spare
        self._chunk_bytes = KVCache.size(flavor, 2, _POSITIONS, dtype)
        self._parked: dict[str, _Parked] = {}  # in the order in which they were parked
        self._free: list[Tensor] = []
        self._until = 0.0  # monotonic; when free chunks are given back
        self._refused = False  # a chunk could not be page-locked

    def __contains__(self, song_id: str) -> bool:
        """Whether a copy of the song's cache is held."""
        return song_id in self._parked

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that are held, free chunks included."""
        return self._chunk_bytes * (len(self._free) + sum(len(parked.chunks) for parked in self._parked.values()))

    def park(self, song_id: str, song: Song, frames: np.ndarray, begun: np.ndarray, cache: KVCache) -> None:
        """Copy what `cache` holds of the prompt and of all int16 `frames` ``[codebooks, T]`` but the last position.

        It was prefilled with those that the song had `begun` with. The last position is fed next, so it is not in the
        cache yet. Copies of other songs make room, the oldest first; without room nothing is kept. Raises what a copy
        from the device raises.
        """
        self.drop(song_id)
        used, size = song.prompt.length + frames.shape[1] - 1, self._positions(cache)
        chunks = self._take(-(-used // size))
        if chunks is None:
            log.info("%s: its caches are not kept, there is no host memory to spare", song_id)
            return
        for held, kept in self._pairs(chunks, cache, used):
            kept.copy_(held, non_blocking=True)
        self._synchronize()
        self._until = time.monotonic() + PARKED_SECONDS
        self._parked[song_id] = _Parked(song=song, frames=frames.copy(), begun=begun, chunks=chunks, until=self._until)
        PARKED_BYTES.set(self.nbytes)

    def restore(self, song_id: str, song: Song, frames: np.ndarray, cache: KVCache) -> np.ndarray | None:
        """Copy a song's parked cache into `cache`; None when there is none of this song with exactly these frames.

        Returns the frames with which it was prefilled, int16 ``[codebooks, T]``. A copy that belongs to other frames is
        dropped. One that was used stays until `drop`, since the song may still not find a place in the batch.
        """
        parked = self._parked.get(song_id)
        if parked is not None and (parked.song != song or not np.array_equal(parked.frames, frames)):
            log.info("%s: its caches were kept for other tokens and are dropped", song_id)
            self.drop(song_id)
            parked = None
        if parked is None:
            return None
        self._copy_back(parked, cache, parked.used)
        return parked.begun

    def share(self, song: Song, frames: np.ndarray, cache: KVCache) -> bool:
        """Copy what prefilling a song with `frames` would leave from a parked song that began so; False without one."""
        for parked in self._parked.values():
            if begins_alike(song, frames, parked.song, parked.begun):
                self._copy_back(parked, cache, song.prompt.length + frames.shape[1] - 1)
                return True
        return False

    def _copy_back(self, parked: _Parked, cache: KVCache, wanted: int) -> None:
        """Copy the first `wanted` positions of a parked cache."""
        first = KVCache(cache.keys[:, :, :, :wanted], cache.values[:, :, :, :wanted])
        for held, kept in self._pairs(parked.chunks, first, parked.used):
            held.copy_(kept[:, :, :, : held.shape[3]], non_blocking=True)
        self._synchronize()

    def drop(self, song_id: str) -> None:
        """Drop a song's copy, if there is one. Its memory serves other songs."""
        parked = self._parked.pop(song_id, None)
        if parked is not None:
            self._free += parked.chunks

    def expire(self) -> None:
        """Drop the copies of songs that have not come back in time, and give free memory back that was not needed."""
        now = time.monotonic()
        for song_id, parked in list(self._parked.items()):
            if parked.until <= now:
                self.drop(song_id)
        if self._until <= now:
            self._free.clear()
        PARKED_BYTES.set(self.nbytes)

    def _positions(self, cache: KVCache) -> int:
        """Positions of a song with this cache that a chunk holds."""
        return 2 * _POSITIONS // cache.keys.shape[1]

    def _pairs(self, chunks: list[Tensor], cache: KVCache, used: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `used` positions of a cache, part by part: in the cache, and in the chunks without gaps."""
        layers, rows, heads, _, width = cache.keys.shape
        size = self._positions(cache)
        for chunk, start in zip(chunks, range(0, used, size), strict=True):
            end = min(start + size, used)
            shape = (2, layers, rows, heads, end - start, width)
            keys, values = chunk[: torch.Size(shape).numel()].view(shape)
            yield cache.keys[:, :, :, start:end], keys
            yield cache.values[:, :, :, start:end], values

    def _take(self, count: int) -> list[Tensor] | None:
        """Take so many chunks: free ones, new ones, then those of the songs parked longest; None if that is too few."""
        room = len(self._free)
        if room < count:
            room += self._spare() // self._chunk_bytes
        if room + sum(len(parked.chunks) for parked in self._parked.values()) < count:
            return None
        while room < count and self._parked:
            oldest = next(iter(self._parked))
            room += len(self._parked[oldest].chunks)
            self.drop(oldest)
        while len(self._free) < count:
            chunk = self._new_chunk()
            if chunk is None:
                return None
            self._free.append(chunk)
        return [self._free.pop() for _ in range(count)]

    def _new_chunk(self) -> Tensor | None:
        """Map a chunk, page-locked where the device is CUDA; None when the system refuses."""
        if self._refused:
            return None
        try:
            memory = mmap.mmap(-1, self._chunk_bytes)
        except OSError as error:
            log.warning("no host memory for the caches of paused songs: %s", error)
            return None
        chunk = torch.frombuffer(memory, dtype=self._dtype)
        if self._device.type == "cuda" and (code := page_lock(chunk, chunk, self._device)):
            self._refused = True  # it would be refused again, for every song
            log.warning("host memory cannot be page-locked (CUDA error %d): paused songs are prefilled again", code)
            return None
        return chunk

    def _synchronize(self) -> None:
        """Wait for the copies: then their memory may be used for others, and errors are this song's."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
