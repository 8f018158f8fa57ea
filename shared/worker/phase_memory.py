"""Memory before and after each phase of a worker's latest turn, as published in its heartbeats."""

from collections.abc import Callable
from pathlib import Path

from shared.device.offload_phases import Phase
from shared.schema.worker import PhaseMemory

_PAGE = 4096


class PhaseMemoryLog:
    """Memory in use on the device at both ends of each phase."""

    def __init__(self, device_used: Callable[[], int]) -> None:
        """`device_used` measures the bytes in use on the device."""
        self._device_used = device_used
        self.phases: list[PhaseMemory] = []
        self.now = 0  # bytes in use on the device when last measured

    def begin(self) -> None:
        """Start the log of a new turn."""
        self.phases = []

    def enter(self, phase: Phase) -> None:
        """Log the start of a phase, and with it the end of the phase before."""
        self.end()
        entered = PhaseMemory(phase=phase.value, device_before=self.now, host=_resident_bytes())
        self.phases = [*self.phases, entered]

    def end(self) -> None:
        """Log the end of the present phase."""
        self.now = self._device_used()
        if self.phases and self.phases[-1].device_after is None:
            last = self.phases[-1]
            ended = PhaseMemory(
                phase=last.phase, device_before=last.device_before, device_after=self.now, host=last.host
            )
            self.phases = [*self.phases[:-1], ended]


def _resident_bytes() -> int:
    """Resident set of this process in bytes; 0 on systems without ``/proc``."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0
