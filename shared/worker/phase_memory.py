"""Memory before and after each phase of a worker's turns, as published in its heartbeats."""

from collections.abc import Callable
from pathlib import Path

from shared.device.turn import Phase
from shared.schema.worker import PhaseMemory

_PAGE = 4096


class PhaseMemoryLog:
    """What the device held at the two ends of each phase of the latest turn."""

    def __init__(self, device_used: Callable[[], int]) -> None:
        """`device_used` tells the bytes in use on the device now."""
        self._device_used = device_used
        self.phases: list[PhaseMemory] = []
        self.now = 0  # bytes on the device when last looked

    def begin(self) -> None:
        """A turn begins."""
        self.phases = []

    def enter(self, phase: Phase) -> None:
        """A phase begins, and with it the one before has ended."""
        self.end()
        entered = PhaseMemory(phase=phase.value, device_before=self.now, host=_resident_bytes())
        self.phases = [*self.phases, entered]

    def end(self) -> None:
        """The last phase has ended."""
        self.now = self._device_used()
        if self.phases and self.phases[-1].device_after is None:
            last = self.phases[-1]
            ended = PhaseMemory(
                phase=last.phase, device_before=last.device_before, device_after=self.now, host=last.host
            )
            self.phases = [*self.phases[:-1], ended]


def _resident_bytes() -> int:
    """Resident set of this process; 0 where the system does not tell it this way."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0
