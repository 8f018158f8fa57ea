"""TCP ports of this machine: find free ones, and reserve them for a test or a stack."""

import fcntl
import os
import random
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

_random = (
    random.SystemRandom()
)  # with the shared generator, two test suites with the same seed would try the same ports
_reservations = Path(f"/tmp/heartmula-ports-{os.getuid()}")
_file: int | None = None  # never closed: closing would release all ports
_reserved: set[int] = set()  # by this process, which the kernel would grant a lock again


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server can listen on this port now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return True  # no such address: the server has the better message
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore closed connections in TIME_WAIT
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def reserve_port(port: int) -> bool:
    """Reserve a port for this process; returns False when another process of this user has reserved it.

    The reservation is a lock on byte number `port` of a file in /tmp, which the kernel releases when this process ends,
    however it ends. Nothing is bound: only callers of this function and of `free_port` respect it.
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
    """Reserve the ports of a server as far as possible, so that `free_port` does not return them while it restarts."""
    with suppress(OSError):  # the server starts all the same where the file belongs to another user
        for port in ports:
            reserve_port(port)


def free_port(offsets: Sequence[int] = (0,)) -> int:
    """Return a port that is free, and reserved until this process ends, like the ports at `offsets` above it.

    An `S3Server` needs ``free_port(S3Server.ports)``. All ports lie below the range from which the kernel takes the
    ports of outgoing connections, so that no connection uses one meanwhile.
    """
    while True:
        first = _random.randrange(10_000, 20_000)
        ports = [first + offset for offset in offsets]
        if _reserved.isdisjoint(ports) and all(port_is_free(port) and reserve_port(port) for port in ports):
            return first
