"""The songs that an engine makes together, and two ways to make their frames."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from services.tokenizer_worker.cuda_graph import Recorder, Recording
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.model import BatchTensors, HeartMuLa, KVCache, Sampler, counter
from services.tokenizer_worker.model.frame import Entrant, Places, make_frame

_BUCKETS = (1, 2, 4, 8, 16, 32)  # and from there on every multiple of the last


@dataclass(kw_only=True, eq=False)
class SongState:
    """Everything that changes while a song is made, and all that its next frame needs. Tensors are on the device."""

    song: Song
    begun: np.ndarray  # int16 [codebooks, T], the frames that its cache was prefilled with
    cache: KVCache  # of the backbone: positions 0 … prompt + max_frames − 1
    embedded: Tensor  # [rows, D], what is fed next; once the song is made with others, a view of their tensors
    launched: int  # frames that the device has made or was asked to make
    received: int  # frames of these that have reached the host

    @property
    def position(self) -> int:
        """The position that is fed next."""
        return self.song.prompt.length + self.launched - 1

    @property
    def counter(self) -> int:
        """Counter of the noise of the next frame."""
        return counter(self.song.seed, self.launched)


class FrameMaker(Protocol):
    """Makes the next frame of some songs at a time."""

    songs: list[SongState]  # in the order of their frames

    def bytes_per_song(self, rows: int) -> int:
        """Bytes on the device that a song of so many rows takes beside its cache."""

    def gather(self, songs: Sequence[SongState]) -> None:
        """Make these songs together from now on. They and `songs` change only once everything has been allocated."""

    def make(self) -> Tensor:
        """Start the next frame of all songs on the device: int64 ``[songs, codebooks]``, valid until the next one.

        After an error all songs are as they were before. The caller counts the frame in `SongState.launched`.
        """

    def part(self) -> None:
        """Hold nothing of the songs any more."""

    def release(self) -> None:
        """Hold nothing on the device any more."""


class LoopFrames:
    """Attention a song at a time, in plain PyTorch: the faster way on the CPU, and the only one without Triton."""

    def __init__(self, model: HeartMuLa, end: int) -> None:
        """Codes from `end` on end a song."""
        self.songs: list[SongState] = []
        self._model, self._end = model, end
        self._batch: BatchTensors | None = None

    def bytes_per_song(self, rows: int) -> int:
        """See `FrameMaker`."""
        config, dtype = self._model.config, self._model.dtype
        depth = KVCache.size(config.decoder, rows, config.num_codebooks, dtype)
        return depth + rows * config.backbone.embed_dim * dtype.itemsize + Sampler.BYTES

    def gather(self, songs: Sequence[SongState]) -> None:
        """See `FrameMaker`."""
        self.part()  # its memory first
        songs = sorted(songs, key=lambda state: -state.song.rows)
        guided = [state for state in songs if state.song.rows == 2]
        sampler = Sampler(
            [state.song.temperature for state in songs],
            [state.song.topk for state in songs],
            [state.song.cfg_scale for state in songs],
            self._model.device,
        )
        batch = BatchTensors(
            caches=[state.cache for state in songs],
            depth_cache=self._model.depth_cache(len(songs) + len(guided)),
            sampler=sampler,
            embedded=torch.stack([state.embedded[0] for state in songs] + [state.embedded[1] for state in guided]),
        )
        for index, state in enumerate(songs):
            state.embedded = batch.embedded[index :: len(songs)]
        self.songs, self._batch = songs, batch

    def make(self) -> Tensor:
        """See `FrameMaker`."""
        assert self._batch is not None
        positions = [state.position for state in self.songs]
        return self._model.next_frame(self._batch, positions, [state.counter for state in self.songs], self._barred())

    def _barred(self) -> Tensor | None:
        """Codes that are not drawn in the next frame of each song, bool ``[songs, Va]``; None: each may be."""
        early = [state.launched < state.song.min_frames for state in self.songs]
        if not any(early):
            return None
        device = self._model.device
        ending = torch.arange(self._model.config.audio_vocab_size, device=device) >= self._end
        return torch.tensor(early, device=device)[:, None] & ending

    def part(self) -> None:
        """See `FrameMaker`."""
        self.songs, self._batch = [], None

    release = part


class BucketFrames:
    """One call for all songs, in a bucket of places for them: CUDA, where that call is a graph.

    A bucket and its graph live until `release`, that is for as long as the weights stay where they are.
    """

    def __init__(self, model: HeartMuLa, end: int, new_recorder: Callable[[], Recorder] | None) -> None:
        """Codes from `end` on end a song.

        `new_recorder` is called for the first frame that is recorded after a `release`; None: none ever is.
        """
        self.songs: list[SongState] = []
        self._model, self._end, self._new_recorder = model, end, new_recorder
        self._recorder: Recorder | None = None
        self._buckets: dict[int, tuple[Places, Recording]] = {}

    def bytes_per_song(self, rows: int) -> int:
        """See `FrameMaker`. A place has two rows in any case; empty places of a bucket are not counted."""
        return Places.bytes_per_place(self._model)

    def gather(self, songs: Sequence[SongState]) -> None:
        """See `FrameMaker`."""
        places, _ = self._bucket(len(songs))
        places.enter([_entrant(state) for state in songs])
        for index, state in enumerate(songs):
            state.embedded = places.embedded[index :: places.count][: state.song.rows]
        self.songs = list(songs)

    def make(self) -> Tensor:
        """See `FrameMaker`."""
        places, recording = self._bucket(len(self.songs))
        recording.run()
        return places.codes[: len(self.songs)]

    def part(self) -> None:
        """See `FrameMaker`. Places hold no tensor of a song, and are taken anew before the next frame."""
        self.songs = []

    def release(self) -> None:
        """See `FrameMaker`."""
        self.part()
        if self._buckets and self._model.device.type == "cuda":
            torch.cuda.synchronize()  # a graph must not go while it is played
        self._buckets.clear()
        self._recorder = None

    def _bucket(self, songs: int) -> tuple[Places, Recording]:
        size = bucket_size(songs)
        if size not in self._buckets:
            places, model, end = Places(self._model, size), self._model, self._end
            if self._recorder is None and self._new_recorder is not None:
                self._recorder = self._new_recorder()
            self._buckets[size] = places, Recording(lambda: make_frame(model, places, end), self._recorder)
        return self._buckets[size]


def bucket_size(songs: int) -> int:
    """Places of the smallest bucket for so many songs: 1, 2, 4, 8, 16, 32, 64, 96, …"""
    return next((size for size in _BUCKETS if songs <= size), -(-songs // _BUCKETS[-1]) * _BUCKETS[-1])


def _entrant(state: SongState) -> Entrant:
    song = state.song
    return Entrant(
        cache=state.cache,
        embedded=state.embedded,
        position=state.position,
        least=song.prompt.length + song.min_frames,
        counter=state.counter,
        temperature=song.temperature,
        topk=song.topk,
        cfg_scale=song.cfg_scale,
    )
