"""One side of a comparison in a process of its own: a JSON line in, what it took as a JSON line out.

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
from torch.nn import functional as F

from services.codec_worker.engine import CodecEngine
from services.codec_worker.heartlib_codec import HeartlibCodec
from services.codec_worker.native import NativeCodec
from services.tokenizer_worker.engine import Song, TokenEngine
from services.tokenizer_worker.heartlib_engine import HeartlibEngine
from services.tokenizer_worker.native import NativeEngine
from shared.checkpoint import Checkpoint, open_checkpoint, tensors
from shared.prompt import Prompt

PROMPT = 128
WINDOW = 372  # codes of a codec window
MATVEC_BYTES = 1 << 31  # more than a cache holds, if the model is that large
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
        self._checkpoint, self._dtype = checkpoint, getattr(torch, dtype)
        prompt = Prompt(tuple(range(1, 21)), tuple(range(21, PROMPT)))
        self._song = Song(prompt=prompt, max_frames=min(1504, checkpoint.lm.backbone.max_seq_len - prompt.length))
        self._songs: list[str] = []
        self._matrices: list[torch.Tensor] = []

    def prefill(self, songs: int) -> dict[str, Any]:
        """Begin songs anew. A song's first frame is included: the reference prefills only as it makes it."""
        for song_id in self._songs:
            self.engine.drop(song_id)
        self._songs = [str(n) for n in range(songs)]
        began = time.perf_counter()
        for song_id in self._songs:
            self.engine.admit(song_id, self._song)
        self.engine.step()
        return {"ms": milliseconds(began), "song_bytes": self.engine.song_bytes(self._song)}

    def step(self) -> dict[str, Any]:
        """A frame of every song."""
        began = time.perf_counter()
        frames = self.engine.step()
        taken = milliseconds(began)
        if any(frame is None for frame in frames.values()):
            raise RuntimeError("a song ended while it was measured")
        return {"ms": taken, "frames": len(frames)}

    @torch.inference_mode()
    def matvec(self) -> dict[str, Any]:
        """Gigabytes a second of one plain loop of matrix-vector products over the backbone's own matrices."""
        if not self._matrices:
            self._matrices = self._read_matrices()
        vectors = [torch.ones(1, matrix.shape[1], dtype=self._dtype, device=DEVICE) for matrix in self._matrices]
        began = time.perf_counter()
        for vector, matrix in zip(vectors, self._matrices, strict=True):
            last = F.linear(vector, matrix)
        last.cpu()  # a device has finished by then
        return {"gb_per_s": sum(matrix.nbytes for matrix in self._matrices) / milliseconds(began) / 1e6}

    def _read_matrices(self) -> list[torch.Tensor]:
        matrices, left = [], MATVEC_BYTES
        for name, tensor in tensors(self._checkpoint.lm_path):
            if name.startswith("backbone.") and tensor.ndim == 2 and left > 0:
                matrices.append(tensor.to(DEVICE, self._dtype, copy=True))
                left -= matrices[-1].nbytes
        return matrices


class Codec:
    """A song of exactly one window."""

    def __init__(self, side: str, checkpoint: Checkpoint, dtype: str) -> None:
        self.engine: CodecEngine = (
            NativeCodec(checkpoint, DEVICE, dtype) if side == "native" else HeartlibCodec(checkpoint, DEVICE, dtype)
        )
        self.engine.load()
        self.engine.to_device()
        shape = (checkpoint.codec.num_quantizers, WINDOW)
        self._codes = np.random.default_rng(0).integers(0, checkpoint.codec.codebook_size, shape, dtype=np.int16)

    def decode(self) -> dict[str, Any]:
        """The last step is the scalar decoder's; an engine that decodes in one step has no parts."""
        began = time.perf_counter()
        ends = [milliseconds(began) for _ in self.engine.decode(self._codes, seed=0)]
        parts = {"estimator_ms": ends[-2], "scalar_ms": ends[-1] - ends[-2]} if len(ends) > 1 else {}
        return {"ms": ends[-1], **parts}


def milliseconds(began: float) -> float:
    """Since a moment of `time.perf_counter`."""
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
