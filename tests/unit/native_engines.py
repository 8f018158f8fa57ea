"""What the tests of the native token engine share: small checkpoints, engines that are ready, whole songs."""

from pathlib import Path

import numpy as np

from services.tokenizer_worker.engine import Song, TokenEngine
from services.tokenizer_worker.native import NativeEngine
from shared.checkpoint import Checkpoint, open_checkpoint
from shared.prompt import Prompt, Prompter

ROOT = Path(__file__).parents[2]
TINY = open_checkpoint(ROOT / "tests/golden/data/ckpt")
DEMO = open_checkpoint(ROOT / "ckpt/demo")


def prompt_of(checkpoint: Checkpoint) -> Prompt:
    return Prompter(checkpoint).encode("piano", "la la la")


def ready(checkpoint: Checkpoint, dtype: str = "float32", slots: int = 1) -> NativeEngine:
    """An engine with its weights on the device and no songs, as in a process that has just begun its turn."""
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
