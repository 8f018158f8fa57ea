"""The clock of the leases: unlike `time.monotonic` it goes on while the machine sleeps."""

import time


def _choose() -> int:
    boot = getattr(time, "CLOCK_BOOTTIME", None)  # Linux has it
    try:
        if boot is not None:
            time.clock_gettime(boot)
            return int(boot)
    except OSError:  # a kernel that knows only the name
        pass
    return time.CLOCK_MONOTONIC


_CLOCK = _choose()


def elapsed() -> float:
    """Seconds since some moment in the past; never set back, and counted through a sleep of the machine."""
    return time.clock_gettime(_CLOCK)
