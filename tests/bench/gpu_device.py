"""A card as a benchmark sees it: time, memory, kernels, and its own limits. On the CPU the same calls work."""

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.bench.gpu_report import Row

_NO_KERNELS = ("Memcpy", "Memset", "Context Sync", "Event Sync", "Stream Sync", "Stream Wait")


class Device:
    """One CUDA device, or the CPU in its place, where figures of the card are zero."""

    def __init__(self, name: str) -> None:
        self.name, self.cuda = name, name.startswith("cuda")
        if self.cuda:
            torch.cuda.set_device(name)
            torch.ones(1, device=name)  # its context

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.name)

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Time of `work`, from an idle device to an idle device."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return (time.perf_counter() - began) * 1000

    def used(self) -> int:
        """Bytes in use on the card, by all processes."""
        if not self.cuda:
            return 0
        free, total = torch.cuda.mem_get_info(self.name)
        return total - free

    def release(self) -> None:
        """Give memory that torch keeps in reserve back to the driver."""
        if self.cuda:
            torch.cuda.empty_cache()

    def forget_peaks(self) -> None:
        """Begin the measurement that `peaks` ends."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.name)

    def peaks(self) -> Row:
        """Peaks since `forget_peaks` of torch's allocations and reserve, and what the card has in use now."""
        if not self.cuda:
            return {"peak_allocated_mb": 0, "peak_reserved_mb": 0, "used_mb": 0}
        allocated, reserved = torch.cuda.max_memory_allocated(self.name), torch.cuda.max_memory_reserved(self.name)
        return {
            "peak_allocated_mb": round(allocated / 1e6),
            "peak_reserved_mb": round(reserved / 1e6),
            "used_mb": round(self.used() / 1e6),
        }

    def kernels(self, work: Callable[[], object]) -> dict[str, tuple[int, float]]:
        """Kernels that `work` runs, those of replayed graphs included: name → how often, and microseconds in all."""
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU]) as recorded:
            work()
            self.synchronize()
        where = "CUDA" if self.cuda else "CPU"
        counts: Counter[str] = Counter()
        times: Counter[str] = Counter()
        for event in recorded.events() or []:
            if event.device_type.name == where and not event.name.startswith(_NO_KERNELS):
                counts[event.name] += 1
                times[event.name] += event.time_range.elapsed_us()
        return {name: (count, float(times[name])) for name, count in counts.items()}

    def describe(self) -> Row:
        """The card, and the versions of what runs on it."""
        row: Row = {"name": platform.processor() or platform.machine(), "memory_gb": 0.0, "compute": "", "cuda": ""}
        if self.cuda:
            found = torch.cuda.get_device_properties(self.name)
            row = {
                "name": found.name,
                "memory_gb": round(found.total_memory / 1e9, 1),
                "compute": f"{found.major}.{found.minor}",
                "cuda": torch.version.cuda,
            }
        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = ""
        return row | {"torch": torch.__version__, "triton": triton, "cores": os.cpu_count()}

    def copy_gb_per_s(self, nbytes: int) -> float:
        """Bandwidth of copies within the device's memory; bytes read and bytes written count."""
        source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=self.name)
        target = torch.empty_like(source)
        target.copy_(source)
        taken = median(self.milliseconds(lambda: target.copy_(source)) for _ in range(20))
        return 2 * nbytes / taken / 1e6

    def launch_us(self, count: int = 1000) -> tuple[float, float]:
        """Microseconds of a small kernel that waits for the one before: launched by PyTorch, and in a graph."""
        x = torch.zeros(2, 3072, device=self.name)

        def work() -> None:
            for _ in range(count):
                x.add_(1)

        work()
        eager = median(self.milliseconds(work) for _ in range(5))
        if not self.cuda:
            return eager * 1000 / count, 0.0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()
        return eager * 1000 / count, median(self.milliseconds(graph.replay) for _ in range(5)) * 1000 / count

    def product_gb_per_s(self, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> float:
        """Bandwidth at which PyTorch's own product of few rows reads its weights, many matrices one after the other."""
        count = max(2, round(1e9 / (outputs * inputs * dtype.itemsize))) if self.cuda else 2
        weights = [torch.randn(outputs, inputs, dtype=dtype, device=self.name) for _ in range(count)]
        x = torch.randn(rows, inputs, dtype=dtype, device=self.name)

        def work() -> list[Tensor]:
            return [torch.nn.functional.linear(x, weight) for weight in weights]

        work()
        taken = median(self.milliseconds(work) for _ in range(10))
        return sum(weight.nbytes for weight in weights) / taken / 1e6


@dataclass
class Captures:
    """Graphs that were captured, and how long each took from its begin until it could be replayed."""

    ms: list[float] = field(default_factory=list)


@contextmanager
def captures() -> Iterator[Captures]:
    """Time every capture of a CUDA graph in the body."""
    found, began = Captures(), [0.0]
    begin, end = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end

    def timed_begin(graph: torch.cuda.CUDAGraph, *arguments: object, **options: object) -> None:
        began[0] = time.perf_counter()
        begin(graph, *arguments, **options)  # type: ignore[arg-type]

    def timed_end(graph: torch.cuda.CUDAGraph) -> None:
        end(graph)
        found.ms.append((time.perf_counter() - began[0]) * 1000)

    torch.cuda.CUDAGraph.capture_begin = timed_begin  # type: ignore[method-assign,assignment]
    torch.cuda.CUDAGraph.capture_end = timed_end  # type: ignore[method-assign,assignment]
    try:
        yield found
    finally:
        torch.cuda.CUDAGraph.capture_begin = begin  # type: ignore[method-assign]
        torch.cuda.CUDAGraph.capture_end = end  # type: ignore[method-assign]
