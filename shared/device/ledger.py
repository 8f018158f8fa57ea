"""Accounts for the memory of a device, process by process.

On a CPU the accounts are the device: they have a capacity, and only what would fit a GPU of that size fits them. On a
GPU they are kept beside the real memory. Every process keeps its own account in a file that it holds locked, so that
the kernel closes the account of a process that dies, just as a driver frees its memory. `journal.jsonl` beside the
accounts records every move, which proves that two models were never on the device together.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import DeviceFull

log = logging.getLogger(__name__)

JOURNAL_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Resident:
    """Something that takes memory on the device."""

    owner: str  # <role>.<instance>
    label: str
    nbytes: int


class DeviceLedger:
    """One process's account on a device. Methods may be called from any thread; they take microseconds."""

    def __init__(self, folder: Path, owner: str, capacity: int, share: int | None = None, way: str = "") -> None:
        """`folder` is shared by all processes that use the device; `capacity` in bytes.

        `share` is what this process may book in all; None: whatever is free. `way` says how it uses the device, for
        the other processes to compare with theirs.
        """
        self._folder, self.owner, self.capacity = folder, owner, capacity
        self._share = capacity if share is None else share
        folder.mkdir(parents=True, exist_ok=True)
        self._mine: dict[str, int] = {}
        self._path = folder / f"{owner}.account"
        with self._exclusive():  # before it is locked, a reader would take it for that of a dead process
            if way:
                _way(self._path).write_text(way)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            os.pwrite(self._fd, b"{}", 0)

    def place(self, label: str, nbytes: int) -> None:
        """Book bytes on the device.

        Raises `DeviceFull` when they do not fit beside what others hold, or beside what is in this process's share.
        """
        with self._exclusive():
            residents = [r for r in self._read() if (r.owner, r.label) != (self.owner, label)]
            used = sum(r.nbytes for r in residents)
            if used + nbytes > self.capacity:
                held = ", ".join(f"{r.label} of {r.owner} ({_mb(r.nbytes)})" for r in residents) or "nothing"
                raise DeviceFull(f"{label} needs {_mb(nbytes)} of a device of {_mb(self.capacity)} that holds {held}")
            mine = sum(size for booked, size in self._mine.items() if booked != label)
            if mine + nbytes > self._share:
                raise DeviceFull(
                    f"{label} needs {_mb(nbytes)} of the {_mb(self._share)} of the device that {self.owner} may use, "
                    f"and that hold {_mb(mine)}"
                )
            self._mine[label] = nbytes
            self._write("place", label, nbytes)

    def remove(self, label: str) -> None:
        """Book bytes out again. Unknown labels are ignored."""
        with self._exclusive():
            nbytes = self._mine.pop(label, None)
            if nbytes is not None:
                self._write("remove", label, nbytes)

    def clear(self) -> None:
        """Book everything of this process out."""
        for label in list(self._mine):
            self.remove(label)

    def residents(self) -> list[Resident]:
        """Everything on the device, of all processes."""
        with self._exclusive():
            return self._read()

    def ways(self) -> dict[str, str]:
        """The owners of all other open accounts, with what each says of its way; empty where it says nothing."""
        with self._exclusive():
            return {path.stem: _way(path).read_text() if _way(path).exists() else "" for path in self._others()}

    def deleted(self) -> bool:
        """Whether this account's file was deleted or moved, so that no other process sees the account."""
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._fd))
        except FileNotFoundError:
            return True

    def close(self) -> None:
        """Close the account."""
        self.clear()
        with self._exclusive():
            _delete(self._path)
        os.close(self._fd)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        fd = os.open(self._folder / "ledger.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _read(self) -> list[Resident]:
        found = [Resident(self.owner, label, nbytes) for label, nbytes in self._mine.items()]
        for path in self._others():
            booked = json.loads(path.read_bytes() or b"{}")
            found += [Resident(path.stem, label, nbytes) for label, nbytes in booked.items()]
        return found

    def _others(self) -> list[Path]:
        """The accounts of the other processes that live. Those of dead ones are deleted."""
        found = []
        for path in self._folder.glob("*.account"):
            if path == self._path:
                continue
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # its process lives
                found.append(path)
            else:
                _delete(path)
            finally:
                os.close(fd)
        return found

    def _write(self, move: str, label: str, nbytes: int) -> None:
        account = json.dumps(self._mine).encode()
        os.pwrite(self._fd, account, 0)
        os.ftruncate(self._fd, len(account))
        try:
            self._note(move, label, nbytes)
        except OSError as error:  # a full disk must not prevent any move
            log.warning("the journal of the device was not written: %s", error)

    def _note(self, move: str, label: str, nbytes: int) -> None:
        journal = self._folder / "journal.jsonl"
        if journal.exists() and journal.stat().st_size > JOURNAL_BYTES:
            journal.replace(self._folder / "journal.1.jsonl")
        line = {"time": time.time(), "pid": os.getpid(), "owner": self.owner, "move": move, "label": label}
        with journal.open("a") as file:
            file.write(json.dumps(line | {"bytes": nbytes}) + "\n")


def _way(account: Path) -> Path:
    """The file beside an account that says how its owner uses the device."""
    return account.with_suffix(".way")


def _delete(account: Path) -> None:
    account.unlink(missing_ok=True)
    _way(account).unlink(missing_ok=True)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MB"
