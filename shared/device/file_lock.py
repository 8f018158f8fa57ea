"""A lock file: mutual exclusion on one host by the kernel, independent of the network."""

import fcntl
import os
from pathlib import Path


class FileLock:
    """Held by a process until it releases it or ends, also while it is stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def take(self) -> bool:
        """Take the lock if it is free."""
        if self._fd is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Release the lock. Does nothing when it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
