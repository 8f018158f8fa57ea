"""Divides the free room of a folder's disk among what is being written there."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import NoRoom, Unavailable

_SPARE_SHARE = 0.02  # of the disk, left to the servers whose data is there too: SeaweedFS writes with 1 % free
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Reservation:
    """Room for bytes that are not written yet."""

    def __init__(self, size: int) -> None:
        self.left = size

    def written(self, size: int) -> None:
        """Count bytes that are on the disk now, where other processes see them."""
        self.left = max(self.left - size, 0)


class Room:
    """What this process may still write; what others write is seen once it is on the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reservations: set[Reservation] = set()

    @contextmanager
    def reserve(self, size: int) -> Iterator[Reservation]:
        """Keep room for so many bytes. Raises `NoRoom` where it is not there, `Unavailable` for a broken disk."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            usage = shutil.disk_usage(self._folder)
        except OSError as error:
            raise disk_error(error) from error
        reserved = sum(reservation.left for reservation in self._reservations)
        if usage.free - reserved - _SPARE_SHARE * usage.total < size:
            raise NoRoom("disk", f"the data folder has no room for another {size:,} bytes at the moment")
        reservation = Reservation(size)
        self._reservations.add(reservation)
        try:
            yield reservation
        finally:
            self._reservations.remove(reservation)


def disk_error(error: OSError) -> Unavailable:
    """The error of ours for one of the data folder's disk."""
    if error.errno in _NO_ROOM:
        return NoRoom("disk", f"the data folder has no room: {error.strerror}")
    return Unavailable("disk", f"the data folder cannot be used: {error.strerror}")
