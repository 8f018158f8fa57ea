"""Helpers for tests of the native engines: small checkpoints, loaded engines, songs, counts of memory."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from services.codec_worker.engines.native import NativeCodec
from services.tokenizer_worker.engines.base import Song, TokenEngine
from services.tokenizer_worker.engines.native import NativeEngine
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.prompt import Prompt, Prompter

ROOT = Path(__file__).parents[2]
TINY = open_checkpoint(ROOT / "tests/golden/data/ckpt")
DEMO = open_checkpoint(ROOT / "ckpt/demo")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, in every module that imports this: the matrices are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompt_of(checkpoint: Checkpoint) -> Prompt:
    return Prompter(checkpoint).encode("piano", "la la la")


def ready_codec(checkpoint: Checkpoint, steps: int) -> NativeCodec:
    """Create a codec with its weights on the device."""
    engine = NativeCodec(checkpoint, "cpu", "float32", steps=steps)
    engine.load()
    engine.to_device()
    return engine


def ready(checkpoint: Checkpoint, dtype: str = "float32", slots: int = 1) -> NativeEngine:
    """Create an engine with its weights on the device and no songs, as at the begin of a turn."""
    engine = NativeEngine(checkpoint, "cpu", dtype, slots)
    engine.load()
    engine.to_device()
    return engine


def generate(engine: TokenEngine, song: Song, made: np.ndarray | None = None) -> np.ndarray:
    """The frames of a song from those on that were made, int16 ``[8, T]``; the song is alone in the engine."""
    engine.admit("song", song, made)
    frames = []
    while (frame := engine.step()["song"]) is not None:
        assert frame.dtype == np.int16
        frames.append(frame)
    return np.stack(frames, axis=1) if frames else np.zeros((8, 0), np.int16)


def live_tensors() -> tuple[int, int]:
    """Number of tensors in this process, and bytes of their storages."""
    gc.collect()
    # A compiler that another test has used keeps tensors of its own kind, without memory.
    tensors: list[Tensor] = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return len(tensors), sum(storages.values())


def resident_bytes() -> int:
    """Resident memory of this process (RSS)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
