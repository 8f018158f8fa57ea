"""Ports of this machine: which are free, and which a test or a stack has set aside."""

import fcntl
import os
import random
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

_random = random.SystemRandom()  # two suites that seed the common one alike would try the same ports
_reservations = Path(f"/tmp/heartmula-ports-{os.getuid()}")
_file: int | None = None  # held open for ever: to close it would give every port back
_reserved: set[int] = set()  # by this process, to which the kernel would grant a lock twice


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on this port now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return True  # no such address: the server itself has the better message
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's TIME_WAIT is no obstacle
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def reserve_port(port: int) -> bool:
    """Set a port aside for this process; False when another process of this user has done so.

    Byte number `port` of a file in /tmp is locked. The kernel unlocks it when this process ends, however it ends.
    Nothing is opened or bound: only those who ask here, as `free_port` does, take notice.
    """
    global _file
    if _file is None:
        _file = os.open(_reservations, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.lockf(_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except (BlockingIOError, PermissionError):
        return False
    _reserved.add(port)
    return True


def keep_ports(ports: Iterable[int]) -> None:
    """Reserve the ports of a server as far as possible: `free_port` then leaves them alone while it restarts."""
    with suppress(OSError):  # another user's file in the way is no reason not to start
        for port in ports:
            reserve_port(port)


def free_port(offsets: Sequence[int] = (0,)) -> int:
    """A port that is free and, until this process ends, reserved; so are those that lie `offsets` above it.

    An `S3Server` needs ``free_port(S3Server.ports)``. All lie below the range from which the kernel picks a client's
    ports, so that no connection takes one meanwhile.
    """
    while True:
        first = _random.randrange(10_000, 20_000)
        ports = [first + offset for offset in offsets]
        if _reserved.isdisjoint(ports) and all(port_is_free(port) and reserve_port(port) for port in ports):
            return first
