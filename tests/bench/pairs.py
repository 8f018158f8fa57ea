"""Compare two checkouts of this project by alternating pairs: is the one here slower than the other anywhere?

``make bench-pairs BASE=<another checkout>``, or ``python -m tests.bench.pairs BASE [CASE …] [--pairs N] [--cpu-time]``.

Both run with this interpreter, each in a process of its own with its own code, on the same weights of mid size (1.5 GB
in the temporary folder). In each pair both take a turn, in changing order. A JSON line for each case: medians in ms,
the median over the pairs of here ÷ base, and the 90 % interval of that median (bootstrap). A case is *slower* where
the whole interval lies above 1.03; the exit status is 1 when any is.

``--cpu-time`` measures one thread's CPU time instead, for machines with other load.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from tests.bench import checkpoints
from tests.bench.__main__ import machine
from tests.bench.pair_side import FRAMES
from tests.bench.sides import ROOT, checkout_side

SLOWER = 1.03
RESAMPLES = 2000
DTYPES = ("float32", "bfloat16")
SCRIPT = ROOT / "tests" / "bench" / "pair_side.py"


@dataclass(frozen=True)
class Case:
    kind: str  # "lm" or "codec"
    dtype: str
    songs: int
    part: str  # what of it is measured, a method of `pair_side`

    def __str__(self) -> str:
        return f"{self.part}-{self.dtype}" + (f"-{self.songs}" if self.part == "frame" else "")


CASES = {
    str(case): case
    for dtype in DTYPES
    for case in (
        Case("lm", dtype, 1, "prefill"),
        *(Case("lm", dtype, songs, "frame") for songs in (1, 2, 4, 8)),
        Case("codec", dtype, 1, "window"),
    )
}


def alternate(here: Callable[[], float], base: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    """Measure both sides in alternating pairs, after a first time that does not count; ``(here, base)`` of each."""
    here(), base()
    taken: list[tuple[float, float]] = []
    for index in range(pairs):
        first, second = (here, base) if index % 2 else (base, here)
        times = first(), second()
        taken.append(times if index % 2 else times[::-1])
    return taken


def interval(ratios: list[float]) -> tuple[float, float]:
    """Bootstrap interval of the median that holds 90 % of the resampled medians."""
    generator = random.Random(0)
    medians = sorted(median(generator.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 20], medians[-RESAMPLES // 20 - 1]


def compare(case: Case, base: Path, folder: Path, pairs: int, *, cpu_time: bool) -> dict[str, object]:
    """Measure a case in alternating pairs."""
    arguments = [str(folder), case.kind, case.dtype, str(case.songs), case.part, "cpu" if cpu_time else "wall"]
    environment = {"OMP_NUM_THREADS": "1"} if cpu_time else {}
    with ExitStack() as stack:
        here, there = (
            stack.enter_context(checkout_side(checkout, SCRIPT, *arguments, environment=environment))
            for checkout in (ROOT, base)
        )
        taken = alternate(partial(here, ""), partial(there, ""), pairs)
    low, high = interval([ours / theirs for ours, theirs in taken])
    return {
        "case": str(case),
        "here_ms": round(median(ours for ours, _ in taken), 2),
        "base_ms": round(median(theirs for _, theirs in taken), 2),
        "ratio": round(median(ours / theirs for ours, theirs in taken), 3),
        "interval": [round(low, 3), round(high, 3)],
        "slower": low > SLOWER,
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.pairs", description=__doc__)
    parser.add_argument("base", type=Path, help="the checkout to compare with")
    parser.add_argument("case", nargs="*", choices=[[], *CASES], help="all of them when none is named")
    parser.add_argument("--pairs", type=int, default=15, help=f"of {FRAMES} frames, a prefill or a window; 7 or more")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread")
    parser.add_argument("--smoke", action="store_true", help="the golden checkpoint only, to see that the bench runs")
    options = parser.parse_args()
    if not (options.base / "services").is_dir():
        parser.error(f"{options.base} is no checkout of this project")
    print(json.dumps(machine()), flush=True)
    slower = False
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for case in [CASES[name] for name in options.case or CASES]:
            folder = Path(name) / case.dtype
            if options.smoke:
                checkpoints.golden(folder)
            elif not folder.exists():
                checkpoints.lm(folder, checkpoints.MID, getattr(torch, case.dtype))
            row = compare(case, options.base.resolve(), folder, options.pairs, cpu_time=options.cpu_time)
            print(json.dumps(row), flush=True)
            slower |= bool(row["slower"])
    sys.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
