"""Kernels that a frame launches on CUDA, and copies between host and device, counted on a pretended device.

What cuBLAS launches beyond one kernel a product shows in a profiler only.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec

from services.tokenizer_worker.engines import native
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import kernels
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.prompt import Prompt
from tests.bench.checkpoints import GOLDEN, OFFICIAL_LM
from tests.bench.rows import emit
from tests.bench.sides import Options
from tests.unit.fake_cuda import fake_cuda

SONGS = (1, 2, 4, 8, 16, 32)
PROMPT = Prompt(tuple(range(1, 21)), tuple(range(21, 300)))


def true_size() -> Checkpoint:
    """A checkpoint of the official shapes, whose weights are never read."""
    return msgspec.structs.replace(open_checkpoint(GOLDEN), lm=OFFICIAL_LM)


def without_weights(engine: NativeEngine) -> NativeEngine:
    """Reserve memory for an engine's weights, of which no page is written."""
    engine._weights.load(lambda: None)
    return engine


def count(songs: int, dtype: str = "bfloat16", int8: tuple[str, ...] = ()) -> dict[str, Any]:
    """Count the launches and copies of one frame of guided songs at true size."""
    with patch.object(native, "missing_compiler", lambda: None):  # nothing is compiled
        engine = without_weights(NativeEngine(true_size(), "cuda:0", dtype, songs, int8=int8))

    with fake_cuda(kernels.launches) as cuda, patch.object(native, "prefill", lambda *_: None):
        engine.to_device()
        for index in range(songs):
            engine.admit(str(index), Song(prompt=PROMPT, max_frames=1504, seed=index))
        with cuda.counting() as counts:
            engine.step()
    return {
        "launches": counts.total,
        "attention": counts.matching("attend"),
        "to_device": counts.to_device,
        "from_device": counts.from_device,
    }


def launches(folder: Path, options: Options) -> None:
    """Count for several numbers of songs; nothing is written into `folder`."""
    int8 = {"off": (), "decoder": ("decoder",), "all": ("backbone", "decoder")}[options.int8]
    for songs in SONGS:
        emit({"bench": "launches", "songs": songs, **count(songs, int8=int8)})
