"""Benchmark of the engines, beside heartlib where it is installed: JSON lines, then a table. See docs/performance.md.

Both sides take turns in processes of their own, so a ratio is always of one run; every time is a median.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from shared.model.checkpoint import Checkpoint
from shared.model.prompt import Prompt
from tests.bench import checkpoints
from tests.bench.accuracy import accuracy

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


class Worker:
    """A process of `tests.bench.worker`, as its caller uses it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._reply()  # it has loaded

    def __call__(self, command: str, *arguments: int) -> Row:
        assert self._process.stdin is not None
        print(json.dumps([command, arguments]), file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("bench: a worker died; what it said stands above")
        reply: Row = json.loads(line)
        return reply


@contextmanager
def worker(side: str, kind: str, checkpoint: Checkpoint, dtype: str, slots: int) -> Iterator[Worker]:
    """Start a process for one measurement, so that the peak of memory belongs to that measurement alone."""
    python = os.environ.get("HEARTLIB_PYTHON") or sys.executable if side == "heartlib" else sys.executable
    command = [python, "-m", "tests.bench.worker", side, kind, str(checkpoint.path), dtype, str(slots)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()


def lm(config: str, checkpoint: Checkpoint, dtype: str, beside: set[int], counts: list[int], rounds: int) -> None:
    """Measure prefills and frames of `counts` songs at once, `beside` the reference (one song at a time) or alone."""
    for songs in counts:
        with ExitStack() as stack:
            sides = [stack.enter_context(worker("native", "lm", checkpoint, dtype, songs))]
            reference = songs in beside
            if reference:
                sides.append(stack.enter_context(worker("heartlib", "lm", checkpoint, dtype, 1)))
            alone = [songs, 1]
            prefills = [
                [side("prefill", n) for side, n in zip(sides, alone, strict=False)]
                for _ in range(max(3, rounds // 5) if songs == 1 else 1)
            ]
            for side in sides:
                side("step")
            frames = [[side("step") for side in sides] for _ in range(rounds)]
            first = {"bench": "lm_prefill", "config": config, "dtype": dtype, "songs": songs}
            if songs == 1:
                emit(compare(first, prefills))
            row = compare({"bench": "lm_frame", "config": config, "dtype": dtype, "songs": songs}, frames, songs)
            row["frames_per_s"] = round(songs * 1000 / row["native_ms"], 2)
            row["native_kv_mb"] = round(prefills[0][0]["song_bytes"] / 1e6, 2)
            if reference:
                row["heartlib_kv_mb"] = round(prefills[0][1]["song_bytes"] / 1e6, 2)
            if songs == 1:
                sides[0]("matvec")
                pairs = [(sides[0]("step")["ms"], sides[0]("matvec")["gb_per_s"]) for _ in range(rounds)]
                row |= bandwidth(checkpoint, dtype, *(median(column) for column in zip(*pairs, strict=True)))
            emit(row)


def codec(config: str, checkpoint: Checkpoint, reference: bool, rounds: int) -> None:
    """Measure one window of 29.76 s: the native codec in either precision, heartlib's in float32."""
    for dtype in ("bfloat16", "float32"):
        with ExitStack() as stack:
            sides = [stack.enter_context(worker("native", "codec", checkpoint, dtype, 1))]
            if reference:
                sides.append(stack.enter_context(worker("heartlib", "codec", checkpoint, "float32", 1)))
            taken = [[side("decode") for side in sides] for _ in range(rounds)]
        row = compare({"bench": "codec_window", "config": config, "dtype": dtype}, taken)
        for part in ("estimator_ms", "scalar_ms"):
            row[part] = round(median(native[part] for native, *_ in taken), 2)
        emit(row)


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


def compare(row: Row, turns: list[list[Row]], songs: int = 1) -> Row:
    """Medians of both sides, and how many times as many frames a second the native engine makes."""
    medians = [median(reply["ms"] for reply in side) for side in zip(*turns, strict=True)]
    for name, taken, last in zip(("native", "heartlib"), medians, turns[-1], strict=False):
        row[f"{name}_ms"] = round(taken, 2)
        row[f"{name}_peak_rss_mb"] = last["peak_rss_mb"]
    if len(medians) > 1:
        row["ratio"] = round(songs * medians[1] / medians[0], 2)
    return row


def bandwidth(checkpoint: Checkpoint, dtype: str, ms: float, matvec: float) -> Row:
    """Bandwidth of a frame (its weights ÷ its time), and its part of what plain matrix-vector products reach."""
    itemsize: int = getattr(torch, dtype).itemsize
    reached = checkpoints.frame_weights(checkpoint.lm) * itemsize / ms / 1e6
    return {
        "weights_gb_per_s": round(reached, 2),
        "matvec_gb_per_s": round(matvec, 2),
        "of_matvec": round(reached / matvec, 3),
    }


ROWS: list[Row] = []


def emit(row: Row) -> None:
    """Print a row as a JSON line, and keep it for the table at the end."""
    ROWS.append(row)
    print(json.dumps(row), flush=True)


def table() -> None:
    """Print all rows as a Markdown table, with a column for each field that any row has."""
    columns = list(dict.fromkeys(name for row in ROWS for name in row))
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in ROWS:
        print("| " + " | ".join(str(row.get(name, "")) for name in columns) + " |")


def machine() -> Row:
    """Description of the machine on which the figures are measured."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    device = os.environ.get("BENCH_DEVICE", "cpu")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "bench": "machine",
        "cpu": cpu,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "memory_gb": round(memory / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


SONGS = [1, 2, 4, 8]
BENCHES: dict[str, Callable[[Path, bool], None]] = {
    "lm_mid": lambda folder, reference: lm(
        "mid",
        checkpoints.lm(folder, checkpoints.MID, torch.float32),
        "float32",
        set(SONGS) if reference else set(),
        SONGS,
        20,
    ),
    "lm_int8": lambda folder, _: int8_both(folder),
    "codec": lambda folder, reference: codec("default", checkpoints.codec(folder), reference, 2),
    # Beside a lone song only: with more of them the two would not fit 24 GB.
    "lm_3b": lambda folder, reference: lm(
        "3b",
        checkpoints.lm(folder, checkpoints.LARGE, torch.bfloat16),
        "bfloat16",
        {1} if reference else set(),
        SONGS,
        5,
    ),
}


def smoke(folder: Path, reference: bool) -> None:
    """Run every measurement once on the golden checkpoint, which takes seconds."""
    checkpoint = checkpoints.golden(folder)
    lm("golden", checkpoint, "float32", {1, 2} if reference else set(), [1, 2], 3)
    codec("golden", checkpoint, reference, 1)
    int8("golden", checkpoint, 1, 3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("name", nargs="*", choices=[[], *BENCHES], help="all of them when none is named")
    parser.add_argument("--reference", choices=["heartlib"], help="measure it too; HEARTLIB_PYTHON may have it")
    parser.add_argument("--smoke", action="store_true", help="the golden checkpoint only, to see that the bench runs")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    for run in [smoke] if options.smoke else [BENCHES[name] for name in options.name or BENCHES]:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            run(Path(folder), options.reference is not None)
    table()


if __name__ == "__main__":
    main()
