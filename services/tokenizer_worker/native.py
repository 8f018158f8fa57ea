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
)
from shared.checkpoint import Checkpoint
from shared.errors import PhaseError, SongError
from shared.weights import Weights, device_memory

# Looked up in host memory, a prompt at a time; on a device they would be a tenth of the weights.
_HOST_ONLY = ("text_embeddings",)
# Positions that are prefilled at once: what a prefill takes beside the caches does not grow with the song.
_PREFILL = 512


@dataclass(kw_only=True)
class SongState:
    """All that changes while a song is made. Nothing else is needed to make its next frame."""

    song: Song
    sampler: Sampler
    backbone_cache: KVCache  # positions 0 … prompt + max_frames − 1
    depth_cache: KVCache  # codebooks 0 … 7, overwritten every frame
    hidden: Tensor  # [rows, D], after the prefill
    frames: int  # made so far: the index of the next one, and with the seed all of its randomness
    last: Tensor | None  # int64 [8], the frame made last, still to be fed


class NativeEngine:
    """A `TokenEngine` that runs the official weights on the CPU or one CUDA device.

    A step makes one frame of each song in turn, so that a song's frames do not depend on the others in the batch.

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

    @property
    def weight_bytes(self) -> int:
        """Bytes that `to_device` moves: everything but the text embeddings, a little padding included."""
        return self._weights.nbytes

    def song_bytes(self, song: Song) -> int:
        """Bytes of a `SongState`. Activations come on top, once for all songs: 512 positions' worth at `admit`."""
        lm, rows = self._checkpoint.lm, _rows(song)
        backbone = KVCache.size(lm.backbone, rows, song.prompt.length + song.max_frames, self._dtype)
        depth = KVCache.size(lm.decoder, rows, lm.num_codebooks, self._dtype)
        hidden = rows * lm.backbone.embed_dim * self._dtype.itemsize
        return backbone + depth + hidden + lm.num_codebooks * torch.int64.itemsize

    def load(self) -> None:
        """Read the weights into host memory in the engine's dtype. Raises the `ConfigError`s of `load_weights`."""
        self._weights.load(lambda: load_weights(self._model, self._checkpoint.lm_path))

    def to_device(self) -> None:
        """Raises `PhaseError` before `load`, and `DeviceFull` with the weights still on the host."""
        self._weights.to_device()

    def to_host(self) -> None:
        """Forget the songs and the device's copy of the weights. Fine to call at any time."""
        self._songs.clear()
        self._weights.to_host()

    @torch.inference_mode()
    def admit(self, song_id: str, song: Song, frames: np.ndarray | None = None) -> None:
        """Allocate the song's caches at their full size and prefill its prompt and all frames but the last.

        In float32 a song that goes on has the frames that it would have had. In bfloat16 sums in another order may tip
        a choice: on the two small checkpoints logits were off by at most 2 % of the largest, and 12 of 105 songs came
        out different, beginning with the 1st to the 127th frame after the interruption.

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
        rows = _rows(song)
        with device_memory():
            made = torch.from_numpy(frames[:, : song.max_frames].T.astype(np.int64)).to(self._device)  # [T, 8]
            cache, depth_cache = model.backbone_cache(rows, positions), model.depth_cache(rows)
            hidden = _prefill(model, song, made[:-1], cache)
            last = made[-1].clone() if len(made) else None  # a view would keep them all
        self._songs[song_id] = SongState(
            song=song,
            sampler=Sampler(song.temperature, song.topk, song.cfg_scale),
            backbone_cache=cache,
            depth_cache=depth_cache,
            hidden=hidden,
            frames=len(made),
            last=last,
        )

    @torch.inference_mode()
    def step(self) -> dict[str, np.ndarray | None]:
        """Frames are int16 ``[8]``. Raises `PhaseError` when the weights are not on the device."""
        model, end = self._ready(), self._checkpoint.gen.audio_eos_id
        with device_memory():
            chosen = {song_id: self._next_frame(model, state) for song_id, state in self._songs.items()}
            made = {song_id: None if codes is None else codes.cpu().numpy() for song_id, codes in chosen.items()}
        # Songs go on only now that every one of them has its frame. One that was computed in vain comes out alike.
        frames: dict[str, np.ndarray | None] = {}
        for song_id, codes in made.items():
            if codes is None or (codes >= end).any():
                self.drop(song_id)
                frames[song_id] = None
            else:
                state = self._songs[song_id]
                state.last, state.frames = chosen[song_id], state.frames + 1
                frames[song_id] = codes.astype(np.int16)
        return frames

    def drop(self, song_id: str) -> None:
        """Works on the device or off it."""
        if self._songs.pop(song_id, None) is not None:
            self._release()

    def _next_frame(self, model: HeartMuLa, state: SongState) -> Tensor | None:
        """int64 ``[8]``, or None at `max_frames`. Changes nothing but the caches' entries of the next position."""
        song, lm, hidden = state.song, self._checkpoint.lm, state.hidden
        if state.frames == song.max_frames:
            return None
        if state.last is not None:
            position = song.prompt.length + state.frames - 1
            hidden = model.advance(model.embed_frames(state.last[None], _rows(song)), state.backbone_cache, position)
        noise: Tensor | None = None  # [8, Va]
        if song.temperature > 0:
            # Drawn on the host, so that every device draws alike; from the frame's own seed, so that a song can
            # go on at any frame without a saved generator.
            generator = torch.Generator().manual_seed(frame_seed(song.seed, state.frames))
            noise = exponential_noise(generator, lm.num_codebooks, lm.audio_vocab_size).to(self._device)

        def choose(codebook: int, logits: Tensor) -> Tensor:
            return state.sampler.draw(logits, None if noise is None else noise[codebook])

        return model.frame(hidden, state.depth_cache, choose)

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
    """Feed the prompt and frames, int64 ``[T, 8]``: hidden state after the last of them, ``[rows, D]``.

    The prompt goes by itself, so that its part of the cache is, to the bit, what it was when the song began.
    """
    rows, length = _rows(song), song.prompt.length
    prompt = model.embed_prompt(song.prompt.tags, song.prompt.lyrics, rows)  # [rows, P, D]
    for start in range(0, length, _PREFILL):
        hidden = model.advance(prompt[:, start : start + _PREFILL], cache, start)
    for start in range(0, len(frames), _PREFILL):
        part = model.embed_frames(frames[start : start + _PREFILL], rows)
        hidden = model.advance(part, cache, length + start)
    return hidden
