"""Filling a song's cache with its prompt and the frames that it has."""

import numpy as np
import torch
from torch import Tensor

from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.model import HeartMuLa, KVCache
from shared.model.sizes import PREFILL

# Positions that are prefilled at once: what a prefill takes beside the caches does not grow with the song.
_PREFILL = PREFILL


def prefill(model: HeartMuLa, song: Song, frames: Tensor, cache: KVCache) -> None:
    """Feed the prompt and frames, int64 ``[T, 8]``, all positions but the last.

    The prompt goes by itself, so that its part of the cache is, to the bit, what it was when the song began. In the
    unconditional row all positions are equal and are computed once.
    """
    rows, length = song.rows, song.prompt.length
    prompt = model.embed_prompt(song.prompt.tags, song.prompt.lyrics, rows)  # [rows, P, D]
    conditional = cache.rows(slice(0, 1))
    for start in range(0, length - 1, _PREFILL):
        model.advance(prompt[:1, start : min(start + _PREFILL, length - 1)], conditional, start)
    if rows == 2:
        model.backbone.repeat(prompt[1:, :1], cache.rows(slice(1, 2)), length - 1)
    last = prompt[:, -1:]
    for start in range(0, len(frames), _PREFILL):
        part = model.embed_frames(frames[None, start : start + _PREFILL]).expand(rows, -1, -1)
        model.advance(torch.cat((last, part[:, :-1]), dim=1), cache, length - 1 + start)
        last = part[:, -1:]


def begins_alike(song: Song, frames: np.ndarray, other: Song, others_frames: np.ndarray) -> bool:
    """Whether prefilling two songs with their frames, int16 ``[codebooks, T]``, leaves equal caches, to the bit."""
    same = (song.prompt, song.rows) == (other.prompt, other.rows)
    return same and np.array_equal(frames, others_frames)


def last_input(model: HeartMuLa, song: Song, frames: Tensor) -> Tensor:
    """Embedding of the last position of the prompt and frames, int64 ``[T, 8]``: ``[rows, D]``, to be fed next."""
    if len(frames):
        return model.embed_frames(frames[-1:]).expand(song.rows, -1)
    return model.embed_prompt((), song.prompt.lyrics[-1:], song.rows)[:, -1]
