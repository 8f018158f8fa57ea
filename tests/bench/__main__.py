"""Benchmark of the engines, beside heartlib where it is installed: JSON lines, then a table. See docs/performance.md.

Both sides take turns in processes of their own, so a ratio is always of one run; every time is a median.
BENCH_DEVICE names the device: cpu (default), cuda or cuda:N.
"""

import argparse
import json
import os
import platform
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from shared.model.checkpoint import open_checkpoint
from tests.bench import checkpoints
from tests.bench.codec_precision import precision_all, precision_rows
from tests.bench.engines import codec, encoder, int8, int8_both, lm
from tests.bench.joins import joins, joins_smoke
from tests.bench.launches import launches
from tests.bench.rows import Row, table
from tests.bench.sides import Options, device_name

SONGS = [1, 2, 4, 8]
Bench = Callable[[Path, Options], None]
"""Measures in a folder of its own, which is removed afterwards, and hands its rows to `emit`."""


def lm_mid(folder: Path, options: Options) -> None:
    checkpoint = checkpoints.lm(folder, checkpoints.MID, torch.float32)
    lm("mid", checkpoint, "float32", set(SONGS) if options.reference else set(), SONGS, 20, options)


def lm_3b(folder: Path, options: Options) -> None:
    checkpoint = checkpoints.lm(folder, checkpoints.LARGE, torch.bfloat16)
    # Beside a lone song only: with more of them the two would not fit 24 GB.
    lm("3b", checkpoint, "bfloat16", {1} if options.reference else set(), SONGS, 5, options)


BENCHES: dict[str, Bench] = {
    "lm_mid": lm_mid,
    "lm_int8": lambda folder, _: int8_both(folder),
    "codec_precision": lambda folder, _: precision_all(folder),
    "joins": lambda folder, _: joins(folder),
    "codec": lambda folder, options: codec("default", checkpoints.codec(folder), 2, options),
    "encoder": lambda folder, _: encoder("official", checkpoints.encoder(folder), 1),
    "lm_3b": lm_3b,
    "launches": launches,
}


def smoke(folder: Path, options: Options) -> None:
    """Run every measurement once on the golden checkpoint, which takes seconds."""
    checkpoint = checkpoints.golden(folder)
    lm("golden", checkpoint, "float32", {1} if options.reference else set(), [1], 3, options)
    codec("golden", checkpoint, 1, options, ("bfloat16",))
    precision_rows("golden", checkpoint, 1)
    encoder("golden", open_checkpoint(checkpoints.GOLDEN_ENCODER), 1)
    joins_smoke(checkpoint)
    int8("golden", checkpoint, 1, 3)


def machine() -> Row:
    """Description of the machine on which the figures are measured."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "bench": "machine",
        "cpu": cpu,
        "device": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "memory_gb": round(memory / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def end_on_signals() -> None:
    """Clear up before a signal ends this process: a checkpoint takes gigabytes in the temporary folder."""
    signals = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]

    def end(number: int, _: FrameType | None) -> None:
        for one in signals:  # a second one must not end the clearing up
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for one in signals:
        signal.signal(one, end)


def arguments() -> tuple[list[Bench], Options]:
    """The benchmarks and the options that the command line names."""
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("name", nargs="*", choices=[[], *BENCHES], help="all of them when none is named")
    parser.add_argument("--reference", choices=["heartlib"], help="measure it too; HEARTLIB_PYTHON may have it")
    parser.add_argument(
        "--int8", choices=["off", "decoder", "all"], default="off", help="as HEARTMULA_INT8, in lm_mid and lm_3b"
    )
    parser.add_argument("--smoke", action="store_true", help="the golden checkpoint only, to see that the bench runs")
    found = parser.parse_args()
    options = Options(reference=found.reference is not None, int8=found.int8)
    return [smoke] if found.smoke else [BENCHES[name] for name in found.name or BENCHES], options


def main() -> None:
    benches, options = arguments()
    end_on_signals()
    print(json.dumps(machine()), flush=True)
    for bench in benches:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            bench(Path(folder), options)
    table()


if __name__ == "__main__":
    main()
