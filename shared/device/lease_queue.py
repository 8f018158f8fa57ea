"""The queue for a device as one candidate has seen it, and for how long each key in it has stood still.

That the server lets a key expire is not relied on: after crashes nats-server 2.15 brings back keys whose TTL had run
out, and never lets them expire again. So each candidate judges by its own clock whether the sequence of a key still
moves.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shared.errors import Unreadable
from shared.nats.subjects import GPU_LOCK
from shared.schema.decoding import decode
from shared.schema.worker import LeaseRecord

PREFIX = f"$KV.{GPU_LOCK}."
STREAM = f"KV_{GPU_LOCK}"
STALE_TTLS = 2  # a key that has not moved for so many TTLs has no owner any more


@dataclass(frozen=True)
class LeaseView:
    """A candidate, as its key shows it."""

    gpu: str
    role: str
    owner: str
    state: str  # "held", "waiting", or "unreadable": of a version that writes something else
    phase: int | None
    since: float  # seconds since the epoch; 0 if unreadable
    ticket: int
    sequence: int  # of its latest write; that of the write by which it took the device is its fencing token
    ttl: int  # seconds; what the key was written with, 0 where that is unknown


def read_record(data: bytes) -> LeaseRecord | None:
    """A candidate's record, or None if it cannot be read."""
    try:
        return decode(data, LeaseRecord)
    except Unreadable:
        return None


def is_gone(data: bytes | None, headers: Mapping[str, str] | None) -> bool:
    """Whether a message is a marker: its key was deleted or has expired."""
    return not data or "KV-Operation" in (headers or {}) or "Nats-Marker-Reason" in (headers or {})


def read_view(subject: str, data: bytes, sequence: int, headers: Mapping[str, str] | None) -> LeaseView:
    """Read a key. One that cannot be read is a candidate too, with its sequence as ticket."""
    gpu, role, owner = subject.removeprefix(PREFIX).split(".")
    found = re.fullmatch(r"(\d{1,6})s", (headers or {}).get("Nats-TTL", ""))
    ttl = int(found[1]) if found else 0
    record = read_record(data)
    if record is None:
        return LeaseView(gpu, role, owner, "unreadable", None, 0.0, sequence, sequence, ttl)
    ticket = record.ticket or sequence
    return LeaseView(gpu, record.role, record.owner, record.state, record.phase, record.since, ticket, sequence, ttl)


@dataclass(frozen=True)
class _Key:
    view: LeaseView
    moved: float  # on `shared.clock`, when this sequence was seen for the first time
    watched: float  # seconds of watching until then


class LeaseQueue:
    """All candidates in the queue. Lives on the lease's loop; only `views` may be read from other threads."""

    def __init__(self, mine: str, ttl: int) -> None:
        """`mine` is our own subject, `ttl` our own TTL in seconds."""
        self._mine, self._ttl = mine, ttl
        self.views: dict[str, LeaseView] = {}  # by subject; replaced as a whole
        self.complete = False  # the snapshot that the present following began with has been read
        self._keys: dict[str, _Key] = {}  # also through a reconnect
        self._latest: dict[str, int] = {}  # highest sequence of each subject, since the present following began
        self._watched = 0.0  # seconds in which a key that moved would have been seen to move
        self._looked = 0.0
        self._free_from = 0.0  # before, a holder whose key vanished may not have noticed

    # --- what the server sends

    def begin(self) -> None:
        """Prepare for a fresh snapshot."""
        self.complete = False
        self._latest = {}

    def finish(self, now: float) -> None:
        """Drop the keys that were not in the snapshot, which has been read."""
        for subject in self._keys.keys() - self._latest.keys():
            self.vanish(subject, self._keys[subject].view.sequence, now)
        self.complete = True

    def observe(self, subject: str, sequence: int, data: bytes, headers: Mapping[str, str] | None, now: float) -> bool:
        """Process a message. False for one that came twice or too late."""
        if sequence <= self._latest.get(subject, 0):
            return False
        self._latest[subject] = sequence
        known = self._keys.get(subject)
        if is_gone(data, headers):
            if (headers or {}).get("KV-Operation") == "DEL":  # by its owner, or by a candidate that saw it stand still
                self._set(subject, None)
            elif known is not None:
                self.vanish(subject, known.view.sequence, now)
        elif known is None or known.view.sequence != sequence:
            view = read_view(subject, data, sequence, headers)
            if view.state == "unreadable" and known is not None:  # each of its renewals would send it to the end
                view = replace(view, ticket=min(known.view.ticket, sequence))
            self._set(subject, _Key(view, now, self._watched))
        return True

    def vanish(self, subject: str, sequence: int, now: float) -> None:
        """Drop a key, if this is its sequence, that its owner has not deleted: it may still hold the device."""
        known = self._keys.get(subject)
        if known is None or known.view.sequence != sequence:
            return
        if subject != self._mine and known.view.state != "waiting":
            self._free_from = max(self._free_from, known.moved + max(self._ttl, known.view.ttl))
        self._set(subject, None)

    def clear(self, subject: str, sequence: int) -> None:
        """Drop a key that was deleted because its owner is certainly gone."""
        known = self._keys.get(subject)
        if known is not None and known.view.sequence == sequence:
            self._set(subject, None)

    def restart(self, subject: str, sequence: int) -> None:
        """Time a key anew, if this is still its sequence: its owner has moved it meanwhile."""
        known = self._keys.get(subject)
        if known is not None and known.view.sequence == sequence:
            self._keys[subject] = replace(known, watched=self._watched)

    def _set(self, subject: str, key: _Key | None) -> None:
        if key is None:
            self._keys.pop(subject, None)
        else:
            self._keys[subject] = key
        self.views = {subject: key.view for subject, key in self._keys.items()}

    # --- what a candidate may do

    def tick(self, now: float, connected: bool) -> None:
        """Let time pass. Time in which we slept, were stopped or cut off counts against no other candidate."""
        if connected and self.complete:
            self._watched += min(now - self._looked, self._ttl / 4)
        self._looked = now

    def doubtful(self, ticket: int) -> list[tuple[str, LeaseView, bool]]:
        """Keys ahead of a ticket that should have moved by now, each with whether it is stale."""
        found: list[tuple[str, LeaseView, bool]] = []
        for subject, key in self._keys.items():
            still, ttl = self._watched - key.watched, max(self._ttl, key.view.ttl)
            if self.complete and subject != self._mine and key.view.ticket < ticket and still >= ttl / 2:
                found.append((subject, key.view, still >= STALE_TTLS * ttl))
        return found

    def is_first(self, ticket: int) -> bool:
        """Whether our own key, with this ticket, is the first in the queue."""
        first = min(self._keys.items(), key=lambda item: item[1].view.ticket, default=None)
        # Having seen our own first write and caught up, we have seen every lower ticket: they are older in the same
        # stream, unless they were written again since.
        return self.complete and first is not None and first[0] == self._mine and first[1].view.ticket == ticket

    def occupied(self, now: float) -> float:
        """Seconds for which a holder whose key has vanished may still use the device."""
        return max(0.0, self._free_from - now)
