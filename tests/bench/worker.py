"""One side of a comparison in a process of its own: commands as JSON lines in, measurements as JSON lines out.

Run as ``python -m tests.bench.worker {native,heartlib} {lm,codec,encoder} FOLDER DTYPE SLOTS``. Between commands it
sleeps, and a device has finished, so that both sides can take turns.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.codec_worker.engines.base import CodecEngine
from services.codec_worker.engines.encoder import PARTS, NativeEncoder
from services.codec_worker.engines.heartlib import HeartlibCodec
from services.codec_worker.engines.native import NativeCodec
from services.tokenizer_worker.engines.base import Song, TokenEngine
from services.tokenizer_worker.engines.heartlib import HeartlibEngine
from services.tokenizer_worker.engines.native import NativeEngine
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.encoder_config import CHUNK
from shared.model.prompt import Prompt
from tests.bench.device import DEVICE, ON_CUDA, check_device, forget_peaks, peaks, synchronise

PROMPT = 128
WINDOW = 372  # codes of a codec window
INT8 = {"off": (), "decoder": ("decoder",), "all": ("backbone", "decoder")}
WARM_UP = 5  # frames: by then kernels are chosen, and CUDA graphs recorded
# Frames of a turn. On CUDA a step starts the next frame while the last one is still made, which a turn of one frame,
# at whose end the device is waited for, would not show.
FRAMES = 8 if ON_CUDA else 1


class LM:
    """Songs of 128 prompt tokens, each with the frames that 2 minutes take, or as many as the positions allow."""

    def __init__(self, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
        self.engine: TokenEngine
        if options.side == "native":
            int8 = INT8[options.int8]
            self.engine = NativeEngine(checkpoint, DEVICE, options.dtype, options.slots, int8=int8)
        else:
            self.engine = HeartlibEngine(checkpoint, DEVICE, options.dtype)
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

    def warm_up(self) -> dict[str, Any]:
        """Make frames that are not measured."""
        return self._frames(WARM_UP)

    def step(self) -> dict[str, Any]:
        """Make the next frames of every song; the time is that of one."""
        return self._frames(FRAMES)

    def _frames(self, count: int) -> dict[str, Any]:
        began = time.perf_counter()
        for _ in range(count):
            if any(frame is None for frame in self.engine.step().values()):
                raise RuntimeError("a song ended while it was measured")
        return {"ms": milliseconds(began) / count}

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
        synchronise()
        began = time.perf_counter()
        for matrix in order:
            torch.mv(matrix, vectors[matrix.shape[1]])
        return {"gb_per_s": sum(matrix.nbytes for matrix in order) / milliseconds(began) / 1e6}


def matrices(module: torch.nn.Module) -> list[torch.Tensor]:
    """All matrices of a stack."""
    return [parameter for parameter in module.parameters() if parameter.ndim == 2]


class Codec:
    """A codec that decodes a song of exactly one window."""

    def __init__(self, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
        self.engine: CodecEngine = (
            NativeCodec(checkpoint, DEVICE, options.dtype)
            if options.side == "native"
            else HeartlibCodec(checkpoint, DEVICE, options.dtype)
        )
        self.engine.load()
        self.engine.to_device()
        shape = (checkpoint.codec.num_quantizers, WINDOW)
        self._codes = np.random.default_rng(0).integers(0, checkpoint.codec.codebook_size, shape, dtype=np.int16)

    def warm_up(self) -> dict[str, Any]:
        """Decode unmeasured on CUDA, where kernels are chosen at their first use; on the CPU that would take minutes
        and change little."""
        return self.decode() if ON_CUDA else {}

    def decode(self) -> dict[str, Any]:
        """Steps that bring audio are the scalar decoder's; an engine that decodes in one step has no parts."""
        last = began = time.perf_counter()
        parts = {"estimator_ms": 0.0, "scalar_ms": 0.0}
        for step in self.engine.decode(self._codes, seed=0):
            synchronise()
            now = time.perf_counter()
            parts["estimator_ms" if step.audio is None else "scalar_ms"] += (now - last) * 1000
            last = now
        return {"ms": (last - began) * 1000, **(parts if parts["estimator_ms"] else {})}


class Encoder:
    """An encoder of one chunk of a recording in stereo, at the rate at which it needs no resampling first."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.engine = NativeEncoder(checkpoint, DEVICE)
        self.engine.load()
        self.engine.to_device()
        self._audio = 0.1 * np.random.default_rng(0).standard_normal((2, CHUNK), np.float32)

    def warm_up(self) -> dict[str, Any]:
        """Encode unmeasured on CUDA, where kernels are chosen at their first use."""
        return self.encode() if ON_CUDA else {}

    def encode(self) -> dict[str, Any]:
        """Time of each part, and what this process holds at most meanwhile, weights included."""
        found: dict[str, Any] = {"ms": 0.0, "weights_mb": self.engine.weight_bytes // 1_000_000}
        steps, worked = self.engine.encode(self._audio, 24_000), time.process_time()
        for part in PARTS:
            forget_peaks()
            began = time.perf_counter()
            next(steps)
            found[f"{part}_ms"] = milliseconds(began)
            found["ms"] += found[f"{part}_ms"]
            found |= {f"{part}_{name}": peak for name, peak in peaks().items()}
        steps.close()
        found["cpu_s"] = time.process_time() - worked  # of all cores: what a busy machine changes least
        return found | {"work_estimate_mb": self.engine.work_bytes // 1_000_000}


def milliseconds(began: float) -> float:
    """Milliseconds from a moment of `time.perf_counter` until the device has done all that it was asked for."""
    synchronise()
    return (time.perf_counter() - began) * 1000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.bench.worker", description=__doc__)
    parser.add_argument("side", choices=["native", "heartlib"])
    parser.add_argument("kind", choices=["lm", "codec", "encoder"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("slots", type=int)
    parser.add_argument("--int8", choices=INT8, default="off")
    return parser.parse_args()


def measured_by(checkpoint: Checkpoint, options: argparse.Namespace) -> LM | Codec | Encoder:
    if options.kind == "encoder":
        return Encoder(checkpoint)
    return LM(checkpoint, options) if options.kind == "lm" else Codec(checkpoint, options)


def main() -> None:
    check_device()
    options = arguments()
    checkpoint = open_checkpoint(options.folder)
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no reply
    measured = measured_by(checkpoint, options)
    synchronise()
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        name, values = json.loads(line)
        command: Callable[..., dict[str, Any]] = getattr(measured, name)
        reply = command(*values) | peaks()
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
