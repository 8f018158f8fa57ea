"""Runner of the local stack, with trivial services in place of the real ones."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local.credentials import load_credentials
from deploy.local.servers.embedded import ROLES, NatsServer, PortInUse, S3Server, free_port
from shared.errors import ConfigError
from tests.unit.test_processes import gone

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0  # seconds until a test that waits for something gives up

# A stack whose gateway answers 200 to everything, at first without workers, and whose worker is a Python expression
# from the environment.
STACK = """
import asyncio, os, signal, sys
from deploy.local import __main__, stack, supervisor

GATEWAY = '''
import http.server, os, signal, sys
looks = ["degraded", "degraded"]
last = os.environ.get("HEALTH", "ok")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/health":
            status = looks.pop() if looks else last
            print("gateway is", status, flush=True)
            self.wfile.write(('{"status":"%s"}' % status).encode())
    def log_message(self, *args):
        pass
def stop(*args):
    os.write(1, b"gateway stops" + os.linesep.encode())  # print may be in the middle of another line
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("gateway", os.getpid(), flush=True)
http.server.HTTPServer(("127.0.0.1", int(os.environ["HEARTMULA_PORT"])), Handler).serve_forever()
'''

class Stack(stack.Stack):
    def __init__(self, settings, environ):
        worker = stack.Service("codec worker", "codec", (sys.executable, "-c", os.environ["WORKER"]))
        gateway = stack.Service("gateway", "gateway", (sys.executable, "-c", GATEWAY))
        super().__init__(settings, environ, gateway, [worker], prepare)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.restart_gateway)

    def restart_gateway(self):
        self.restarting = asyncio.create_task(self.restart("gateway"))

async def prepare(settings):
    pass  # there is no NATS

stack.STARTING = supervisor.RestartPolicy(max_ends=3)  # to reach the limit quickly
__main__.Stack = Stack
sys.exit(__main__.main())
"""

WORKER = """
import os, signal, sys, time
def stop(*args):
    os.write(1, b"worker stops" + os.linesep.encode())
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("worker", os.getpid(), os.environ["HEARTMULA_NATS_URL"], os.environ["OMP_NUM_THREADS"], flush=True)
time.sleep(1000)
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Run:
    """A trivial stack in a process of its own."""

    def __init__(self, data_dir: Path, port: int, worker: str = WORKER, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", STACK],
            cwd=ROOT,
            env={
                # With PYTHONUNBUFFERED, print writes a line in pieces, which the lines of other processes get between.
                **{
                    key: value
                    for key, value in os.environ.items()
                    if not key.startswith(("HEARTMULA_", "PYTHONUNBUFFERED"))
                },
                "HEARTMULA_DATA_DIR": str(data_dir),
                "HEARTMULA_PORT": str(port),
                # Both named: the embedded servers stay out of these tests.
                "HEARTMULA_NATS_URL": "nats://elsewhere:4222",
                "HEARTMULA_S3_ENDPOINT": "http://elsewhere:9000",
                "HEARTMULA_S3_ACCESS_KEY": "key",
                "HEARTMULA_S3_SECRET_KEY": "secret",
                "WORKER": worker,
                **environ,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def until_line(self, start: str, seen: int = 0) -> str:
        """Wait for a line that starts with this text, after the first `seen` lines; it may exist already."""
        for line in self.lines[seen:]:
            if line.startswith(start):
                return line
        assert self.process.stdout
        impatience = threading.Timer(PATIENCE, self.process.kill)
        impatience.start()
        try:
            for line in self.process.stdout:
                self.lines.append(line.rstrip("\n"))
                if line.startswith(start):
                    return self.lines[-1]
        finally:
            impatience.cancel()
        raise AssertionError(f"no line {start!r} in {self.lines}; {self.end()}")

    def pids(self) -> list[int]:
        """Process ids of the gateway and the worker, as far as they have printed them."""
        found = [re.match(r"(gateway|worker) (\d+)", line) for line in self.lines]
        return [int(match[2]) for match in found if match]

    def end(self) -> tuple[int, str]:
        """Wait until the stack ends; returns exit code and standard error."""
        out, err = self.process.communicate(timeout=PATIENCE)
        self.lines += out.splitlines()
        return self.process.returncode, err


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(worker: str = WORKER, *, data_dir: Path = tmp_path / "data", port: int = 0, **environ: str) -> Run:
        runs.append(Run(data_dir, port or free_port(), worker, **environ))
        return runs[-1]

    yield start
    for one in runs:
        if one.process.poll() is None:
            one.process.kill()
            one.end()


def test_the_stack_says_ready_once_gateway_and_workers_run(run: Callable[..., Run]) -> None:
    port = free_port()
    stack = run(port=port, OMP_NUM_THREADS="7")
    assert stack.until_line("ready") == f"ready: http://127.0.0.1:{port}"
    started = [line for line in stack.lines if line.startswith("starting")]
    assert started == ["starting gateway", "starting codec worker"]
    assert stack.until_line("worker").split()[2:] == ["nats://elsewhere:4222", "7"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_parts_last_one_first(run: Callable[..., Run], number: signal.Signals) -> None:
    stack = run()
    stack.until_line("ready")
    stack.until_line("worker")
    stack.process.send_signal(number)
    assert stack.end() == (0, "")
    assert stack.lines[-2:] == ["worker stops", "gateway stops"]
    assert len(stack.pids()) == 2
    assert all(gone(pid) for pid in stack.pids())


def test_nothing_survives_a_killed_runner(run: Callable[..., Run]) -> None:
    stack = run()
    stack.until_line("ready")
    stack.until_line("worker")
    pids = stack.pids()
    assert len(pids) == 2
    assert not any(gone(pid) for pid in pids)
    stack.process.kill()
    until(lambda: all(gone(pid) for pid in pids))


def test_a_part_with_a_wrong_setting_stops_the_stack_and_is_named(run: Callable[..., Run]) -> None:
    stack = run("import sys; sys.exit(2)")
    assert stack.end() == (1, "error: codec worker ended with exit code 2\n")
    assert stack.lines[-1] == "gateway stops"


def test_a_part_that_never_gets_ready_stops_the_stack_after_some_attempts(run: Callable[..., Run]) -> None:
    stack = run("import sys; sys.exit(3)", HEALTH="degraded")
    code, error = stack.end()
    assert code == 1
    assert error.splitlines() == [
        "codec worker ended with exit code 3; starting it again in 0.5 s",
        "codec worker ended with exit code 3; starting it again in 1 s",
        "error: codec worker ended 3 times within 10 minutes; lastly, codec worker ended with exit code 3",
    ]
    assert stack.lines[-1] == "gateway stops"


@pytest.mark.parametrize(("part", "number"), [("gateway", signal.SIGTERM), ("worker", signal.SIGKILL)])
def test_a_part_that_is_killed_is_started_again_alone(
    run: Callable[..., Run], part: str, number: signal.Signals
) -> None:
    stack = run()
    stack.until_line("ready")
    stack.until_line("worker")
    pids = dict(zip(("gateway", "worker"), stack.pids(), strict=True))
    os.kill(pids.pop(part), number)
    stack.until_line(f"starting {'codec worker' if part == 'worker' else part} again")
    stack.until_line(f"{part} ", seen=len(stack.lines))
    assert not any(gone(pid) for pid in pids.values())
    stack.process.send_signal(signal.SIGINT)
    code, error = stack.end()
    assert code == 0
    assert error.endswith("starting it again in 0.5 s\n")
    assert stack.lines[-2:] == ["worker stops", "gateway stops"]


def test_a_part_is_restarted_on_demand(run: Callable[..., Run]) -> None:
    stack = run()
    stack.until_line("ready")
    stack.until_line("worker")
    gateway, worker = stack.pids()
    seen = len(stack.lines)
    stack.process.send_signal(signal.SIGUSR1)
    assert stack.until_line("gateway", seen) == "gateway stops"
    assert stack.until_line("gateway", len(stack.lines)) != f"gateway {gateway}"
    assert not gone(worker)
    stack.process.send_signal(signal.SIGINT)
    assert stack.end() == (0, "")


def test_a_stack_ends_while_a_part_waits_to_be_started_again(run: Callable[..., Run]) -> None:
    stack = run("import sys; sys.exit(3)", HEALTH="degraded")
    stack.until_line("starting codec worker again")
    stack.process.send_signal(signal.SIGINT)
    assert stack.end()[0] == 0
    assert stack.lines[-1] == "gateway stops"


def test_one_data_folder_has_one_stack(run: Callable[..., Run], tmp_path: Path) -> None:
    first = run()
    first.until_line("ready")
    code, error = run().end()
    assert code == 2
    assert error == (
        f"error: another stack runs on {tmp_path / 'data'}: stop it, or set HEARTMULA_DATA_DIR to another folder\n"
    )
    assert first.process.poll() is None


def test_a_folder_is_free_again_after_a_killed_runner(run: Callable[..., Run]) -> None:
    first = run()
    first.until_line("ready")
    first.process.kill()
    first.process.wait()
    assert run().until_line("ready")


def test_a_taken_port_of_the_gateway_is_reported(run: Callable[..., Run], tmp_path: Path) -> None:
    port = free_port()
    run(port=port).until_line("ready")
    code, error = run(port=port, data_dir=tmp_path / "other").end()
    assert (code, error) == (
        2,
        f"error: port {port} for the gateway is in use: set HEARTMULA_PORT to another port\n",
    )


def test_a_wrong_setting_is_one_line(run: Callable[..., Run]) -> None:
    stack = run(HEARTMULA_DEVICE="tpu")
    assert stack.end() == (2, "error: HEARTMULA_DEVICE must be auto, cpu, cuda or cuda:N, got 'tpu'\n")
    assert stack.lines == []


def test_a_data_folder_that_cannot_be_made_is_reported(run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, error = run(data_dir=tmp_path / "file" / "data").end()
    assert code == 2
    assert "HEARTMULA_DATA_DIR" in error
    assert "Traceback" not in error


def test_credentials_are_private_random_and_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made = load_credentials(tmp_path / "a")
    path = tmp_path / "a" / "credentials.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_credentials(tmp_path / "a") == made
    other = load_credentials(tmp_path / "b")
    assert not set(made.nats_passwords.values()) & set(other.nats_passwords.values())
    assert made.s3_secret_key != other.s3_secret_key


def test_damaged_credentials_are_not_replaced_silently(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text('{"nats_operator": ')
    with pytest.raises(ConfigError, match=r"credentials\.json"):
        load_credentials(tmp_path)
    assert path.read_text() == '{"nats_operator": '


@pytest.mark.parametrize("offset", [0, 5, 10_008])
async def test_a_server_whose_port_is_taken_names_the_setting(tmp_path: Path, offset: int) -> None:
    first = free_port(S3Server.ports)
    with socket.create_server(("127.0.0.1", first + offset)):
        with pytest.raises(PortInUse, match=rf"port {first + offset} .*HEARTMULA_S3_PORT"):
            await S3Server(tmp_path, first, "key", "secret").start()
        with pytest.raises(PortInUse, match=rf"port {first + offset} .*HEARTMULA_NATS_PORT"):
            await NatsServer(tmp_path, first + offset, dict.fromkeys(ROLES, "password")).start()
    assert list(tmp_path.iterdir()) == []


def test_a_port_too_high_for_the_object_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HEARTMULA_S3_PORT may be at most 55527"):
        S3Server(tmp_path, 55_528, "key", "secret")
