"""Counts the writes of this process that a server refused or did not confirm."""

from typing import Literal

from prometheus_client import Counter

FAILED_WRITES = Counter(
    "heartmula_failed_writes",
    "Writes of this process that a server refused or did not confirm",
    ["server"],
    registry=None,
)
_TALLY = {"nats": 0, "s3": 0}
for _server in _TALLY:
    FAILED_WRITES.labels(_server)  # a figure that is 0 is shown too


def write_failed(server: Literal["nats", "s3"]) -> None:
    """Count a failed write."""
    FAILED_WRITES.labels(server).inc()
    _TALLY[server] += 1


def writes_failed() -> int:
    """How many writes failed since this process began."""
    return sum(_TALLY.values())
