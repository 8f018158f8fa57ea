"""One side of a comparison in a process of its own: commands as JSON lines in, measurements as JSON lines out.

Run as ``python -m tests.bench.worker {native,heartlib} {lm,codec} FOLDER DTYPE SLOTS``. Between commands it sleeps, so
that both sides can take turns on the same cores.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.codec_worker.engines.base import CodecEngine
from services.codec_worker.engines.heartlib import HeartlibCodec
from services.codec_worker.engines.native import NativeCodec
from services.tokenizer_worker.engines.base import Song, TokenEngine
from services.tokenizer_worker.engines.heartlib import HeartlibEngine
from services.tokenizer_worker.engines.native import NativeEngine
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.prompt import Prompt

PROMPT = 128
WINDOW = 372  # codes of a codec window
DEVICE = os.environ.get("BENCH_DEVICE", "cpu")


class LM:
    """Songs of 128 prompt tokens, each with the frames that 2 minutes take, or as many as the positions allow."""

    def __init__(self, side: str, checkpoint: Checkpoint, dtype: str, slots: int) -> None:
        self.engine: TokenEngine = (
            NativeEngine(checkpoint, DEVICE, dtype, slots)
            if side == "native"
            else HeartlibEngine(checkpoint, DEVICE, dtype)
        )
        self.engine.load()
        self.engine.to_device()
        prompt = Prompt(tuple(range(1, 21)), tuple(range(21, PROMPT)))
        self._song = Song(prompt=prompt, max_frames=min(1504, checkpoint.lm.backbone.max_seq_len - prompt.length))
        self._songs: list[str] = []

    def prefill(self, songs: int) -> dict[str, Any]:
        """Begin new songs. A song's first frame is included: the reference prefills only as it makes it."""
        for song_id in self._songs:
            self.engine.drop(song_id)
        self._songs = [str(n) for n in range(songs)]
        began = time.perf_counter()
        for song_id in self._songs:
            self.engine.admit(song_id, self._song)
        self.engine.step()
        return {"ms": milliseconds(began), "song_bytes": self.engine.song_bytes(self._song)}

    def step(self) -> dict[str, Any]:
        """Make the next frame of every song."""
        began = time.perf_counter()
        frames = self.engine.step()
        taken = milliseconds(began)
        if any(frame is None for frame in frames.values()):
            raise RuntimeError("a song ended while it was measured")
        return {"ms": taken, "frames": len(frames)}

    @torch.inference_mode()
    def matvec(self) -> dict[str, Any]:
        """Measure gigabytes a second of a loop of matrix-vector products over the native engine's weights, in the order
        in which a frame reads them."""
        assert isinstance(self.engine, NativeEngine)
        model = self.engine._ready()
        order = [*matrices(model.backbone), model.head.weight]
        for head in matrices(model.depth_heads):
            order += [model.projection.weight, *matrices(model.decoder), head]
        vectors = {width: torch.ones(width, dtype=model.dtype, device=DEVICE) for width in {m.shape[1] for m in order}}
        began = time.perf_counter()
        for matrix in order:
            last = torch.mv(matrix, vectors[matrix.shape[1]])
        last.cpu()  # a device has finished by then
        return {"gb_per_s": sum(matrix.nbytes for matrix in order) / milliseconds(began) / 1e6}


def matrices(module: torch.nn.Module) -> list[torch.Tensor]:
    """All matrices of a stack."""
    return [parameter for parameter in module.parameters() if parameter.ndim == 2]


class Codec:
    """A codec that decodes a song of exactly one window."""

    def __init__(self, side: str, checkpoint: Checkpoint, dtype: str) -> None:
        self.engine: CodecEngine = (
            NativeCodec(checkpoint, DEVICE, dtype) if side == "native" else HeartlibCodec(checkpoint, DEVICE, dtype)
        )
        self.engine.load()
        self.engine.to_device()
        shape = (checkpoint.codec.num_quantizers, WINDOW)
        self._codes = np.random.default_rng(0).integers(0, checkpoint.codec.codebook_size, shape, dtype=np.int16)

    def decode(self) -> dict[str, Any]:
        """Steps that bring audio are the scalar decoder's; an engine that decodes in one step has no parts."""
        last = began = time.perf_counter()
        parts = {"estimator_ms": 0.0, "scalar_ms": 0.0}
        for step in self.engine.decode(self._codes, seed=0):
            now = time.perf_counter()
            parts["estimator_ms" if step.audio is None else "scalar_ms"] += (now - last) * 1000
            last = now
        return {"ms": (last - began) * 1000, **(parts if parts["estimator_ms"] else {})}


def milliseconds(began: float) -> float:
    """Milliseconds since a moment of `time.perf_counter`."""
    return (time.perf_counter() - began) * 1000


def main() -> None:
    side, kind, folder, dtype, slots = sys.argv[1:]
    checkpoint = open_checkpoint(Path(folder))
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no reply
    measured = LM(side, checkpoint, dtype, int(slots)) if kind == "lm" else Codec(side, checkpoint, dtype)
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        command: Callable[..., dict[str, Any]] = getattr(measured, name)
        reply = command(*arguments)
        reply["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
