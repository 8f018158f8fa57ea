"""The agreement of a device's workers whether models stay on it or take turns.

Each computes its plan alone (`shared.device.memory_plan`); with other settings it may find another one. Where models
stay, the lease lets both roles work at once, so one that takes turns would not be safe beside one that stays.
"""

import fcntl
import os
from pathlib import Path


class Agreement:
    """A worker's way to use a device, seen by the other workers on it for as long as its process lives.

    Each way has a file, which all workers of that way hold locked together: the kernel unlocks it for one that dies.
    """

    def __init__(self, folder: Path, stays: bool) -> None:
        """Say that models stay on the device of this `folder`, or that they take turns."""
        folder.mkdir(parents=True, exist_ok=True)
        self._asking = folder / "ways.lock"
        self._others = folder / ("turns.lock" if stays else "stays.lock")
        self._mine = _open(folder / ("stays.lock" if stays else "turns.lock"))
        fcntl.flock(self._mine, fcntl.LOCK_SH)

    def broken(self) -> bool:
        """Whether a live worker uses the device in the other way."""
        asking, others = _open(self._asking), _open(self._others)
        try:
            fcntl.flock(asking, fcntl.LOCK_EX)  # two that ask at once would take each other for that worker
            fcntl.flock(others, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(others)
            os.close(asking)
        return False

    def close(self) -> None:
        """Leave the device."""
        os.close(self._mine)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
