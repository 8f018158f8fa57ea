"""Engines of the GPU tests and of the GPU bench: the three ways to make frames, and songs of any length at once."""

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch

from services.tokenizer_worker.cuda_graph import GraphRecorder
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.frames import BucketFrames, LoopFrames
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model.frame import unsuitable
from shared.model.checkpoint import Checkpoint
from shared.model.prompt import Prompt

Way = Literal["graphs", "kernels", "loop"]
"""How frames are made: recorded as graphs, by the same kernels launched one by one, or by plain PyTorch alone."""


def ready(
    checkpoint: Checkpoint, device: str, dtype: str = "float32", slots: int = 1, way: Way | None = None
) -> NativeEngine:
    """An engine with its weights on the device and no songs. Without a `way` it is as the worker builds it."""
    engine = NativeEngine(checkpoint, device, dtype, slots)
    engine.load()
    engine.to_device()
    if way is not None:
        take(engine, way)
    return engine


def take(engine: NativeEngine, way: Way) -> None:
    """Make frames of an engine without songs in another way.

    Graphs need CUDA: on the CPU they are left out. Kernels on CUDA need heads of a multiple of 8 elements, which the
    golden checkpoint's depth decoder has not: there it is the loop.
    """
    engine._frames.release()
    on_cuda = engine._device.type == "cuda"
    end = engine._checkpoint.gen.audio_eos_id
    if way == "loop" or (on_cuda and unsuitable(engine._checkpoint.lm)):
        engine._frames = LoopFrames(engine._model, end)
    else:
        engine._frames = BucketFrames(engine._model, end, GraphRecorder if way == "graphs" and on_cuda else None)


def prompt_of(length: int) -> Prompt:
    """A prompt of so many positions, tags and lyrics of neighbouring token ids."""
    return Prompt(tuple(range(1, 8)), tuple(range(8, length)))


def codes_of(checkpoint: Checkpoint, frames: int, seed: int = 0) -> np.ndarray:
    """Random frames that a song may continue from, int16 ``[codebooks, frames]``."""
    lm, codec = checkpoint.lm, checkpoint.codec
    most = min(lm.audio_vocab_size, checkpoint.gen.audio_eos_id, codec.codebook_size)
    return np.random.default_rng(seed).integers(0, most, (lm.num_codebooks, frames), dtype=np.int16)


def songs_of(checkpoint: Checkpoint, frames: int) -> dict[str, Song]:
    """Songs of several kinds, each of at most so many frames: guided and not, greedy and sampled, any top-k."""
    tags = prompt_of(12)
    longer = prompt_of(29)
    kinds = [
        Song(prompt=tags, max_frames=frames, topk=5, seed=1),
        Song(prompt=longer, max_frames=frames, topk=50, seed=2, cfg_scale=3.0, temperature=0.8),
        Song(prompt=tags, max_frames=frames, topk=1, seed=3, cfg_scale=1.0),
        Song(prompt=longer, max_frames=frames - 3, temperature=0, seed=4),
        Song(prompt=tags, max_frames=frames, topk=20, seed=5, cfg_scale=1.0, temperature=1.3),
    ]
    return {f"song {number}": song for number, song in enumerate(kinds)}


def advance(engine: NativeEngine, made: dict[str, list[np.ndarray]], steps: int | None = None) -> None:
    """Step until no song is left, or so many times; frames are added to `made`. Songs are dropped at their end."""
    count = 0
    while engine._songs and (steps is None or count < steps):
        for name, frame in engine.step().items():
            if frame is not None:
                made[name].append(frame)
        count += 1


def generate(engine: NativeEngine, song: Song, before: np.ndarray | None = None) -> np.ndarray:
    """The frames of a song from those `before` on, int16 ``[codebooks, T]``; the song is alone in the engine."""
    made: dict[str, list[np.ndarray]] = {"song": []}
    engine.admit("song", song, before)
    advance(engine, made)
    return stacked(made["song"], engine._checkpoint.lm.num_codebooks)


def stacked(frames: Iterable[np.ndarray], codebooks: int = 8) -> np.ndarray:
    """Frames as int16 ``[codebooks, T]``."""
    return np.stack([np.zeros(codebooks, np.int16), *frames], axis=1)[:, 1:]


def cuda_or_cpu() -> str:
    """The device that a bench or a test takes when it is not named."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"
