"""One side of `tests.bench.pairs`: a case measured with the engines that PYTHONPATH leads to, on the CPU.

Run as ``pair_side.py FOLDER {lm,codec} DTYPE SONGS {prefill,frame,window} {wall,cpu}``; it answers each line of its
input by a line with milliseconds. It uses of an engine what every version has.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from services.codec_worker.engines.native import NativeCodec
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.prompt import Prompt

PROMPT = 128
FRAMES = 5  # of a measurement
WINDOW = 372  # codes of a codec window


def language_model(checkpoint: Checkpoint, dtype: str, songs: int, part: str) -> Callable[[], None]:
    """Measured: a prefill with the first frame, or some frames of all songs."""
    engine = NativeEngine(checkpoint, "cpu", dtype, songs)
    engine.load()
    engine.to_device()
    frames = min(1504, checkpoint.lm.backbone.max_seq_len - PROMPT)
    song = Song(prompt=Prompt(tuple(range(1, 21)), tuple(range(21, PROMPT))), max_frames=frames)

    def prefill() -> None:
        for name in range(songs):
            engine.drop(str(name))
            engine.admit(str(name), song)
        engine.step()

    def frame() -> None:
        for _ in range(FRAMES):
            if any(frame is None for frame in engine.step().values()):
                raise RuntimeError("a song ended while it was measured")

    if part == "frame":
        prefill()
    return prefill if part == "prefill" else frame


def codec(checkpoint: Checkpoint, dtype: str) -> Callable[[], None]:
    """Measured: a window of the small codec."""
    engine = NativeCodec(checkpoint, "cpu", dtype)
    engine.load()
    engine.to_device()
    shape = (checkpoint.codec.num_quantizers, WINDOW)
    codes = np.random.default_rng(0).integers(0, checkpoint.codec.codebook_size, shape, dtype=np.int16)

    def window() -> None:
        for _ in engine.decode(codes, seed=0):
            pass

    return window


def main() -> None:
    folder, kind, dtype, songs, part, clock = sys.argv[1:]
    checkpoint = open_checkpoint(Path(folder))
    measured = language_model(checkpoint, dtype, int(songs), part) if kind == "lm" else codec(checkpoint, dtype)
    now = time.process_time if clock == "cpu" else time.perf_counter
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no reply
    for _ in sys.stdin:
        began = now()
        measured()
        print((now() - began) * 1000, file=replies, flush=True)


if __name__ == "__main__":
    main()
