"""``make gpu``: what a card makes of the official sizes, most important first, within a time limit.

JSON lines as they come, then tables; docs/gpu.md says what each line answers. Weights are random: times do not depend
on them. With ``--tiny`` everything runs once on the CPU, on the golden checkpoint, to see that it runs.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from services.codec_worker.model.flow_matching import STEPS
from shared.model.checkpoint import Checkpoint
from tests.bench import checkpoints
from tests.bench.gpu_codec import Codec, first_sound
from tests.bench.gpu_device import Device
from tests.bench.gpu_lm import LM
from tests.bench.gpu_report import Report

LIMIT = 480.0  # seconds
FILES = 15e9  # bytes of both checkpoints
# In memory beside files in memory: both models in page-locked memory, and the rest of the machine.
MEMORY = FILES + 20e9


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured: official sizes on a card, or little on the CPU."""

    prompt: int  # positions
    frames: int  # that a prefill of a long song begins with
    batches: tuple[tuple[int, int], ...]  # songs and positions, in the order of measuring
    ratios: tuple[tuple[int, int], ...]
    small: tuple[tuple[int, int], ...]  # of those, which with int8 weights
    profiled: tuple[tuple[int, int], ...]
    warm: int  # frames before the first that is timed: kernels are compiled and graphs recorded
    timed: int  # frames
    compared: int  # frames of each way in a ratio
    counted: int  # frames whose kernels are counted
    steps: int  # of the codec
    rounds: int  # windows
    window: int  # frames before the first sound
    slots: int
    copied: int  # bytes


FULL = Size(
    prompt=300,
    frames=1748,
    batches=(
        *((1, 2048), (16, 2048), (8, 2048), (32, 2048), (1, 512), (8, 512)),
        *((16, 512), (32, 512), (2, 2048), (4, 2048), (2, 512), (4, 512)),
    ),
    ratios=((1, 2048), (8, 2048)),
    small=((1, 2048), (16, 2048), (1, 512)),
    profiled=((1, 2048), (16, 2048)),
    warm=6,
    timed=24,
    compared=12,
    counted=2,
    steps=STEPS,
    rounds=3,
    window=372,
    slots=32,
    copied=1 << 30,
)
TINY = Size(
    prompt=20,
    frames=30,
    batches=((2, 50),),
    ratios=((1, 50),),
    small=((1, 50),),
    profiled=((2, 50),),
    warm=1,
    timed=1,
    compared=1,
    counted=1,
    steps=1,
    rounds=0,
    window=12,
    slots=3,
    copied=1 << 20,
)


class Bench:
    """All measurements of a run."""

    def __init__(self, report: Report, device: Device, size: Size, folder: Path, tiny: bool) -> None:
        self.report, self.device, self.size, self.folder, self.tiny = report, device, size, folder, tiny
        self.copy_gb_per_s = 0.0

    def run(self) -> None:
        """Measure, most important first. What an error or the time costs is missing; the rest is measured."""
        size, measure = self.size, self.report.measure
        self.report.emit("device", **self.device.describe())
        measure("copies and launches", self.limits, 10)
        loaded = measure("the language model's checkpoint", self.write_lm, 20) and measure(
            "loading it", self.load_lm, 20
        )
        if loaded:
            lm = self.lm
            measure("prefill", lm.prefill, 10)
            for songs, position in size.batches:
                profile = (songs, position) in size.profiled
                frames = partial(lm.frame, songs, position, "graphs", size.timed, profile=profile)
                measure(f"frames of {songs} songs at {position}", frames, 4 + songs / 2)
            for songs, position in size.ratios:
                measure(f"graphs, kernels, loop: {songs} songs", partial(lm.ratio, songs, position, size.compared), 15)
            measure("parking", partial(lm.parking, size.prompt + size.frames), 8)
            lm.engine.to_host()  # a small card has no room for both models
        if measure("the codec's checkpoint", self.write_codec, 20):
            self.codec = Codec(self.device, self.report, self.codec_checkpoint, size.steps)
            measure("windows in float32", partial(self.codec.windows, "float32", size.rounds), 30)
            measure("windows in bfloat16", partial(self.codec.windows, "bfloat16", size.rounds), 20)
            if loaded:
                measure("first sound", self.first_sound, 15)
            self.codec.release()
        for which in ("decoder", "all") if loaded else ():
            measure(f"int8 {which}", partial(self.int8, which), 40)

    def limits(self) -> None:
        """What the card itself can do: copies, launches, PyTorch's own products of two rows."""
        self.copy_gb_per_s = self.device.copy_gb_per_s(self.size.copied)
        eager, graph = self.device.launch_us()
        self.report.emit(
            "limits", copy_gb_per_s=round(self.copy_gb_per_s, 1), launch_us=round(eager, 2), graph_us=round(graph, 3)
        )
        wide = 64 if self.tiny else 3072
        for rows in (1, 2, 16, 32, 64):
            for outputs, inputs in ((5 * wide // 3, wide), (wide, wide), (16 * wide // 3, wide), (wide, 8 * wide // 3)):
                reached = self.device.product_gb_per_s(rows, outputs, inputs, torch.bfloat16)
                shape = f"{outputs} × {inputs}"
                of_copy = round(reached / self.copy_gb_per_s, 3)
                self.report.emit("product", rows=rows, shape=shape, gb_per_s=round(reached, 1), of_copy=of_copy)
        self.device.release()

    def write_lm(self) -> None:
        began = time.perf_counter()
        self.lm_checkpoint = (
            checkpoints.golden(self.folder / "lm")
            if self.tiny
            else checkpoints.lm(self.folder / "lm", checkpoints.LARGE, torch.bfloat16)
        )
        self.written("lm", self.lm_checkpoint.lm_path, began)

    def load_lm(self) -> None:
        size = self.size
        self.lm = LM(
            self.device,
            self.report,
            self.lm_checkpoint,
            "bfloat16",
            size.slots,
            prompt=size.prompt,
            frames=size.frames,
            warm=size.warm,
            counted=size.counted,
        )
        self.lm.copy_gb_per_s = self.copy_gb_per_s
        self.lm.load()
        self.lm.moves()

    def write_codec(self) -> None:
        began = time.perf_counter()
        self.codec_checkpoint: Checkpoint = (
            checkpoints.golden(self.folder / "codec") if self.tiny else checkpoints.codec(self.folder / "codec")
        )
        self.written("codec", self.codec_checkpoint.codec_path, began)

    def first_sound(self) -> None:
        assert self.codec.engine is not None
        first_sound(self.report, self.lm.engine, self.codec.engine, self.size.prompt, self.size.window)

    def int8(self, which: str) -> None:
        self.lm.smaller(which)
        for songs, position in self.size.small:
            self.lm.frame(songs, position, "graphs", self.size.timed, profile=songs == 1 and position == 2048)

    def written(self, model: str, folder: Path, began: float) -> None:
        gb, seconds = (
            sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9,
            time.perf_counter() - began,
        )
        self.report.emit("checkpoint", model=model, folder=str(self.folder), gb=round(gb, 3), s=round(seconds, 2))


def fastest_folder(files: float = FILES, memory: float = MEMORY) -> Path:
    """The folder that was written to fastest of those that have room for `files` bytes; in memory, with `memory` left.

    Raises `SystemExit` when none has room.
    """
    rates: dict[Path, float] = {}
    for folder in dict.fromkeys([Path("/dev/shm"), Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]):
        if not os.access(folder, os.W_OK):
            continue
        status = os.statvfs(folder)
        if status.f_bavail * status.f_frsize < files * 1.1:
            continue
        if folder == Path("/dev/shm") and available_memory() < memory:
            continue
        rates[folder] = _write_rate(folder)
    if not rates:
        raise SystemExit(f"gpu: no folder has {files / 1e9:.0f} GB free for the checkpoints; TMPDIR may name one")
    return max(rates, key=lambda folder: rates[folder])


def available_memory() -> int:
    """Bytes of memory that programs can still take (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _write_rate(folder: Path) -> float:
    """Bytes a second at which 256 MB reach a folder, the disk included."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(256):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return 256 * len(block) / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=LIMIT, help="time limit (480)")
    parser.add_argument("--device", default="cuda:0", help="cuda:0, or another one")
    parser.add_argument("--folder", type=Path, help="for the checkpoints; the fastest one that has room")
    parser.add_argument("--tiny", action="store_true", help="the golden checkpoint on the CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("gpu: PyTorch sees no CUDA device here (torch.cuda.is_available())", file=sys.stderr)
        return 1
    report = Report(options.seconds)
    with report.watched():
        root = options.folder or (Path(tempfile.gettempdir()) if options.tiny else fastest_folder())
        with tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=root) as folder:
            device = Device("cpu" if options.tiny else options.device)
            Bench(report, device, TINY if options.tiny else FULL, Path(folder), options.tiny).run()
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
