"""Reserved ports: two processes never get the same one."""

import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

from deploy.local.servers.embedded import ROLES, S3Server, nats_server
from deploy.local.servers.ports import free_port, port_is_free, reserve_port

ROOT = Path(__file__).parents[2]

# Another test suite: it takes ports from a given number on, prints which it got, and keeps them until it ends.
OTHER = """
import sys
from deploy.local.servers import ports
numbers = iter(range(int(sys.argv[1]), 65536))
ports._random.randrange = lambda low, high: next(numbers)
print(ports.free_port((0, 1)), flush=True)
sys.stdin.read()
"""


def other(first: int) -> subprocess.Popen[str]:
    """Start a process that looks for two adjacent ports from `first` on."""
    return subprocess.Popen(
        [sys.executable, "-c", OTHER, str(first)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    return int(process.stdout.readline())


def test_two_processes_never_get_the_same_port_before_anything_listens() -> None:
    first = free_port((0, 1, 2, 3, 4, 5))
    with other(first - 1) as one, other(first - 1) as two:
        try:
            got = [said(one), said(two)]
        finally:
            one.kill()
            two.kill()
    ours = set(range(first, first + 6))
    assert not {port + i for port in got for i in (0, 1)} & ours
    assert abs(got[0] - got[1]) > 1


def test_a_port_is_released_by_a_process_that_was_killed() -> None:
    with other(free_port((0, 1)) + 1) as process:
        port = said(process)
        assert not reserve_port(port)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert reserve_port(port)


async def test_the_ports_of_a_server_stay_reserved_while_it_is_started_again(tmp_path: Path) -> None:
    with other(free_port((0, 1)) + 1) as process:
        port = said(process)
        process.kill()
    async with nats_server(tmp_path, port, dict.fromkeys(ROLES, "password")):
        pass
    assert port_is_free(port)
    with other(port) as process:
        assert said(process) > port
        process.kill()


def test_one_process_gets_no_port_twice() -> None:
    state = random.getstate()
    found = [free_port()]
    random.setstate(state)  # as a test library does before each test
    found += [free_port() for _ in range(200)]
    assert len(set(found)) == len(found)


def test_all_ports_of_the_object_store_are_free() -> None:
    first = free_port(S3Server.ports)
    assert all(port_is_free(first + offset) for offset in S3Server.ports)
    server = S3Server(Path("/nonexistent"), first, "key", "secretsecret")
    assert {port - first for port in server._ports()} <= set(S3Server.ports)


def test_a_port_on_which_a_server_listens_is_not_free() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert not port_is_free(port)
    assert port_is_free(port)
