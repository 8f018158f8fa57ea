"""The device that workers measure on, from BENCH_DEVICE: ``cpu``, ``cuda`` or ``cuda:N``.

The parent leaves it alone, because a context of CUDA takes memory of the card that is measured. It runs
``python -m tests.bench.device``, which prints the device's name.
"""

import os

import torch

from tests.bench.memory import forget_peak, peak_rss_mb

DEVICE = os.environ.get("BENCH_DEVICE") or "cpu"
ON_CUDA = DEVICE.startswith("cuda")


def check_device(device: str = DEVICE) -> None:
    """Raise `SystemExit` with what to change where this PyTorch cannot use the device."""
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        kind, index = "", None
    if kind not in ("cpu", "cuda"):
        raise SystemExit(f"bench: BENCH_DEVICE={device} is no device: set it to cpu, cuda or cuda:N")
    if kind == "cpu":
        return
    if torch.version.cuda is None and torch.version.hip is None:
        raise SystemExit(
            f"bench: BENCH_DEVICE={device} needs PyTorch with CUDA, and {torch.__version__} is a build for the CPU: "
            "install another build, or unset BENCH_DEVICE"
        )
    if not torch.cuda.is_available():
        raise SystemExit(
            f"bench: BENCH_DEVICE={device} needs a card, and PyTorch finds none: see what nvidia-smi says, "
            "or unset BENCH_DEVICE"
        )
    if (index or 0) >= torch.cuda.device_count():
        raise SystemExit(f"bench: BENCH_DEVICE={device}, and the last card is cuda:{torch.cuda.device_count() - 1}")


def synchronise() -> None:
    """Wait until the device has done all that it was asked for; the CPU always has."""
    if ON_CUDA:
        torch.cuda.synchronize(DEVICE)


def peaks() -> dict[str, int | None]:
    """Peaks of this process's memory so far, in MB: on the host and, of what its allocator reserved, on the card."""
    found = {"peak_rss_mb": peak_rss_mb()}
    if ON_CUDA:
        found["peak_device_mb"] = torch.cuda.max_memory_reserved(DEVICE) // 1_000_000
    return found


def forget_peaks() -> None:
    """Let both peaks begin anew with what is in use now."""
    forget_peak()
    if ON_CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)


if __name__ == "__main__":
    check_device()
    print(torch.cuda.get_device_name(DEVICE) if ON_CUDA else DEVICE)
