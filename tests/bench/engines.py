"""Benchmarks of the engines: frames and prefills of the language model, windows of the codec, accuracy of int8."""

import random
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch

from shared.model.checkpoint import Checkpoint
from shared.model.prompt import Prompt
from tests.bench import checkpoints
from tests.bench.accuracy import accuracy
from tests.bench.rows import Row, compare, emit
from tests.bench.sides import Options, Worker, worker


def lm(
    config: str,
    checkpoint: Checkpoint,
    dtype: str,
    beside: set[int],
    counts: list[int],
    rounds: int,
    options: Options,
) -> None:
    """Measure prefills and frames of `counts` songs at once, `beside` the reference (one song at a time) or alone."""
    about: Row = {"config": config, "dtype": dtype}
    about |= {"int8": options.int8} if options.int8 != "off" else {}
    for songs in counts:
        with ExitStack() as stack:
            sides = [stack.enter_context(worker("native", "lm", checkpoint, dtype, songs, options))]
            if songs in beside:
                sides.append(stack.enter_context(worker("heartlib", "lm", checkpoint, dtype)))
            prefills = [begin(sides, songs) for _ in range(1 + max(3, rounds // 5) if songs == 1 else 1)]
            if songs == 1:
                emit(compare({"bench": "lm_prefill", **about, "songs": songs}, prefills[1:]))  # the first one warms up
            for side in sides:
                side("warm_up")
            frames = [[side("step") for side in sides] for _ in range(rounds)]
            row = compare({"bench": "lm_frame", **about, "songs": songs}, frames, songs)
            row["frames_per_s"] = round(songs * 1000 / row["native_ms"], 2)
            for name, prefill in zip(("native", "heartlib"), prefills[0], strict=False):
                row[f"{name}_kv_mb"] = round(prefill["song_bytes"] / 1e6, 2)
            if songs == 1 and options.int8 == "off":
                row |= bandwidth(sides[0], checkpoint, dtype, rounds)
            emit(row)


def begin(sides: list[Worker], songs: int) -> list[Row]:
    """Begin `songs` new songs on the native side, and one on the other."""
    return [side("prefill", n) for side, n in zip(sides, [songs, 1], strict=False)]


def bandwidth(native: Worker, checkpoint: Checkpoint, dtype: str, rounds: int) -> Row:
    """Bandwidth of a frame (its weights ÷ its time), and its part of what plain matrix-vector products reach."""
    native("matvec")  # warms up
    pairs = [(native("step")["ms"], native("matvec")["gb_per_s"]) for _ in range(rounds)]
    ms, matvec = (median(column) for column in zip(*pairs, strict=True))
    itemsize: int = getattr(torch, dtype).itemsize
    reached = checkpoints.frame_weights(checkpoint.lm) * itemsize / ms / 1e6
    return {
        "weights_gb_per_s": round(reached, 2),
        "matvec_gb_per_s": round(matvec, 2),
        "of_matvec": round(reached / matvec, 3),
    }


def codec(
    config: str,
    checkpoint: Checkpoint,
    rounds: int,
    options: Options,
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
) -> None:
    """Measure one window of 29.76 s: the native codec in each precision, heartlib's in float32."""
    for dtype in dtypes:
        with ExitStack() as stack:
            sides = [stack.enter_context(worker("native", "codec", checkpoint, dtype))]
            if options.reference:
                sides.append(stack.enter_context(worker("heartlib", "codec", checkpoint, "float32")))
            for side in sides:
                side("warm_up")
            taken = [[side("decode") for side in sides] for _ in range(rounds)]
        row = compare({"bench": "codec_window", "config": config, "dtype": dtype}, taken)
        for part in ("estimator_ms", "scalar_ms"):
            row[part] = round(median(native[part] for native, *_ in taken), 2)
        emit(row)


def encoder(config: str, checkpoint: Checkpoint, rounds: int) -> None:
    """Measure one chunk of 29.76 s in stereo, and its parts; heartlib's release of this comparison has no encoder."""
    with worker("native", "encoder", checkpoint, "float32") as side:
        side("warm_up")
        taken = [side("encode") for _ in range(rounds)]
    row: Row = {"bench": "encoder_chunk", "config": config, "dtype": "float32"}
    times = [name for name in taken[0] if name.endswith(("ms", "cpu_s"))]
    row |= {name: round(median(reply[name] for reply in taken), 2) for name in times}
    emit(row | {name: value for name, value in taken[-1].items() if name not in times and name.endswith("_mb")})


def int8(config: str, checkpoint: Checkpoint, songs: int, frames: int) -> None:
    """Measure what int8 weights change, beside what bfloat16 changes, on songs of random text."""
    generator, words = random.Random(0), checkpoint.lm.text_vocab_size
    prompts = [
        Prompt(*(tuple(generator.randrange(words) for _ in range(length)) for length in (12, 52))) for _ in range(songs)
    ]
    for row in accuracy(checkpoint, prompts, frames):
        emit({"bench": "lm_int8", "config": config, **row})


def int8_both(folder: Path) -> None:
    """Measure int8 on both small checkpoints. Their texts are random: neither is trained."""
    int8("golden", checkpoints.golden(folder / "golden"), 8, 24)
    int8("mid", checkpoints.lm(folder / "mid", checkpoints.MID, torch.float32), 4, 24)
