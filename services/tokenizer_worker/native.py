"""The native token engine: this project's own HeartMuLa behind the `TokenEngine` interface."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.tokenizer_worker.engine import Song, check_frames
from services.tokenizer_worker.model import (
    HeartMuLa,
    KVCache,
    Sampler,
    exponential_noise,
    frame_seed,
    load_weights,
    spread,
)
from shared.checkpoint import Checkpoint
from shared.errors import PhaseError, SongError
from shared.weights import Weights, device_memory

# Looked up in host memory, a prompt at a time; on a device they would be a tenth of the weights.
_HOST_ONLY = ("text_embeddings",)
# Positions that are prefilled at once: what a prefill takes beside the caches does not grow with the song.
_PREFILL = 512


@dataclass(kw_only=True, eq=False)
class SongState:
    """All that changes while a song is made. Nothing else is needed to make its next frame."""

    song: Song
    cache: KVCache  # of the backbone: positions 0 … prompt + max_frames − 1
    position: int  # the next one to be fed
    embedded: Tensor  # [rows, D], what is fed there
    frames: int  # made so far: the index of the next one, and with the seed all of its randomness


@dataclass(kw_only=True, eq=False)
class Lineup:
    """What the songs that are made together share, from when one joins or leaves until the next does."""

    states: list[SongState]  # those with guidance first, as the model's rows lie
    sampler: Sampler
    depth_cache: KVCache  # of all their rows: codebooks 0 … 7, overwritten every frame


class NativeEngine:
    """A `TokenEngine` that runs the official weights on the CPU or one CUDA device.

    A step makes a frame of all songs at once. Rows of a batch share the weights and nothing else, so a song's frames do
    not depend on the others; in another company sums may be added in another order, which in float32 tips no choice
    but between logits that are equal to some six digits.

    `dtype` is float32, bfloat16 or float16. A song has at most `max_frames` frames in all, its first included; the
    reference makes one more. It ends before the first frame in which any code is `audio_eos_id` or above, even if
    that is its very first (the reference does not look at that one). Other codes outside the codec's codebooks pass.

    Methods that allocate on the device raise `DeviceFull`.
    """

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: str, slots: int = 1) -> None:
        self.slots = slots
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        with torch.device("meta"):
            self._model = HeartMuLa(checkpoint.lm, self._dtype)
        self._weights = Weights(self._model, self._device, host_only=_HOST_ONLY)
        self._songs: dict[str, SongState] = {}
        self._lineup: Lineup | None = None  # until the first step after a song has left

    @property
    def weight_bytes(self) -> int:
        """Bytes that `to_device` moves: everything but the text embeddings, a little padding included."""
        return self._weights.nbytes

    def song_bytes(self, song: Song) -> int:
        """Bytes of a `SongState` and its part of the `Lineup`.

        Activations come on top: those of a frame of all songs, and 512 positions' worth at `admit`.
        """
        lm, rows = self._checkpoint.lm, _rows(song)
        backbone = KVCache.size(lm.backbone, rows, song.prompt.length + song.max_frames, self._dtype)
        depth = KVCache.size(lm.decoder, rows, lm.num_codebooks, self._dtype)
        return backbone + depth + rows * lm.backbone.embed_dim * self._dtype.itemsize + Sampler.BYTES

    def load(self) -> None:
        """Read the weights into host memory in the engine's dtype. Raises the `ConfigError`s of `load_weights`."""
        self._weights.load(lambda: load_weights(self._model, self._checkpoint.lm_path))

    def to_device(self) -> None:
        """Raises `PhaseError` before `load`, and `DeviceFull` with the weights still on the host."""
        self._weights.to_device()

    def to_host(self) -> None:
        """Forget the songs and the device's copy of the weights. Fine to call at any time."""
        self._songs.clear()
        self._lineup = None
        self._weights.to_host()

    @torch.inference_mode()
    def admit(self, song_id: str, song: Song, frames: np.ndarray | None = None) -> None:
        """Allocate the song's caches at their full size and prefill all positions but the last: a step begins there.

        In float32 a song that goes on has the frames that it would have had. In bfloat16 sums in another order may tip
        a choice: on the two small checkpoints, when songs were still stepped one by one, logits were off by at most 2 %
        of the largest, and 12 of 105 songs came out different, from the 1st to the 127th frame after the interruption.

        Raises `SongError` when prompt and frames exceed the model's positions, `PhaseError` when the weights are not
        on the device.
        """
        model, lm = self._ready(), self._checkpoint.lm
        if song_id in self._songs or len(self._songs) == self.slots:
            raise ValueError(f"no slot for song {song_id}: {', '.join(self._songs)} of {self.slots} in the batch")
        positions, limit = song.prompt.length + song.max_frames, lm.backbone.max_seq_len
        if positions > limit:
            raise SongError(
                f"the prompt's {song.prompt.length} positions and {song.max_frames} frames exceed the model's {limit}"
            )
        if frames is None:
            frames = np.zeros((lm.num_codebooks, 0), np.int16)
        check_frames(frames, lm.num_codebooks, min(lm.audio_vocab_size, self._checkpoint.gen.audio_eos_id))
        with device_memory():
            made = torch.from_numpy(frames[:, : song.max_frames].T.astype(np.int64)).to(self._device)  # [T, 8]
            cache = model.backbone_cache(_rows(song), positions)
            state = SongState(
                song=song,
                cache=cache,
                position=song.prompt.length + len(made) - 1,
                embedded=_prefill(model, song, made, cache),
                frames=len(made),
            )
            self._lineup = None  # its memory first
            self._lineup = self._line_up([*self._songs.values(), state])
        self._songs[song_id] = state

    @torch.inference_mode()
    def step(self) -> dict[str, np.ndarray | None]:
        """Frames are int16 ``[8]``. Raises `PhaseError` when the weights are not on the device."""
        model, end = self._ready(), self._checkpoint.gen.audio_eos_id
        going = {name: state for name, state in self._songs.items() if state.frames < state.song.max_frames}
        made: dict[str, np.ndarray] = {}
        if going:
            with device_memory():
                if self._lineup is None or len(self._lineup.states) != len(going):
                    self._lineup = None
                    self._lineup = self._line_up(list(going.values()))
                states = self._lineup.states
                chosen = self._next_frames(model, self._lineup)
                embedded = spread(model.embed_frames(chosen), sum(_rows(state.song) for state in states))
                codes = chosen.cpu().numpy().astype(np.int16)  # all that the host waits for
            # Songs go on only now that every one has its frame. One that was computed in vain comes out alike.
            names = {state: name for name, state in going.items()}
            for index, state in enumerate(states):
                made[names[state]] = codes[index]
                state.embedded = embedded[index :: len(states)]
                state.position, state.frames = state.position + 1, state.frames + 1
        frames: dict[str, np.ndarray | None] = {}
        for song_id in list(self._songs):
            frame = made.get(song_id)
            frames[song_id] = None if frame is None or (frame >= end).any() else frame
            if frames[song_id] is None:
                self.drop(song_id)
        return frames

    def drop(self, song_id: str) -> None:
        """Works on the device or off it."""
        if self._songs.pop(song_id, None) is not None:
            self._lineup = None
            self._release()

    def _line_up(self, states: list[SongState]) -> Lineup:
        states = sorted(states, key=lambda state: -_rows(state.song))
        songs = [state.song for state in states]
        sampler = Sampler(
            [song.temperature for song in songs],
            [song.topk for song in songs],
            [song.cfg_scale for song in songs],
            self._device,
        )
        depth_cache = self._model.depth_cache(sum(_rows(song) for song in songs))
        return Lineup(states=states, sampler=sampler, depth_cache=depth_cache)

    def _next_frames(self, model: HeartMuLa, lineup: Lineup) -> Tensor:
        """int64 ``[songs, 8]``. Changes nothing but the caches' entries of the next position."""
        states, guided = lineup.states, [state for state in lineup.states if _rows(state.song) == 2]
        embedded = torch.stack([s.embedded[0] for s in states] + [s.embedded[1] for s in guided])  # [rows, D]
        hidden = model.step(embedded, [state.cache for state in states], [state.position for state in states])
        noise = torch.stack([self._noise(state) for state in states])  # [songs, 8, Va]
        if self._device.type == "cuda":
            noise = noise.pin_memory()  # or the copy would wait for the backbone
        noise = noise.to(self._device, non_blocking=True)
        return model.frame(
            hidden, lineup.depth_cache, lambda codebook, logits: lineup.sampler.draw(logits, noise[:, codebook])
        )

    def _noise(self, state: SongState) -> Tensor:
        """Of the song's next frame, fp32 ``[8, Va]`` on the host; ones for a greedy song.

        Drawn on the host, so that every device draws alike; from the frame's own seed, so that a song can go on at
        any frame without a saved generator.
        """
        shape = self._checkpoint.lm.num_codebooks, self._checkpoint.lm.audio_vocab_size
        if state.song.temperature == 0:
            return torch.ones(shape)
        return exponential_noise(torch.Generator().manual_seed(frame_seed(state.song.seed, state.frames)), *shape)

    def _ready(self) -> HeartMuLa:
        if not self._weights.on_device:
            raise PhaseError("the language model is not on the device")
        return self._model

    def _release(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _rows(song: Song) -> int:
    """A conditional row and, unless guidance leaves it as it is, an unconditional one."""
    return 1 if song.cfg_scale == 1 else 2


def _prefill(model: HeartMuLa, song: Song, frames: Tensor, cache: KVCache) -> Tensor:
    """Feed the prompt and frames, int64 ``[T, 8]``, up to the last position: its embedding, ``[rows, D]``.

    The prompt goes by itself, so that its part of the cache is, to the bit, what it was when the song began.
    """
    rows, length = _rows(song), song.prompt.length
    prompt = model.embed_prompt(song.prompt.tags, song.prompt.lyrics, rows)  # [rows, P, D]
    for start in range(0, length - 1, _PREFILL):
        model.advance(prompt[:, start : min(start + _PREFILL, length - 1)], cache, start)
    last = prompt[:, -1:]
    for start in range(0, len(frames), _PREFILL):
        part = model.embed_frames(frames[None, start : start + _PREFILL]).expand(rows, -1, -1)
        model.advance(torch.cat((last, part[:, :-1]), dim=1), cache, length - 1 + start)
        last = part[:, -1:]
    return last[:, 0].clone()  # a view would keep them all
