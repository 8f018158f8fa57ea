"""The peak of a process's memory."""

from pathlib import Path

STATUS = Path("/proc/self/status")
FORGET = Path("/proc/self/clear_refs")


def peak_rss_mb() -> int | None:
    """Highest resident memory of this process since its program started, in MB; None where there is no /proc.

    Not `ru_maxrss`: on Linux that begins with what the parent had when it started this process, and elsewhere its unit
    differs. The kernel keeps VmHWM for each address space, and a program starts in a new one.
    """
    if not STATUS.is_file():
        return None
    peak = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024 // 1_000_000


def forget_peak() -> None:
    """Let `peak_rss_mb` begin anew with what is resident now; without /proc there is no peak."""
    if FORGET.is_file():
        FORGET.write_text("5")
