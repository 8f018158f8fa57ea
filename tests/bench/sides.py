"""The sides of a comparison, as the parent has them: processes of `tests.bench.worker`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.model.checkpoint import Checkpoint
from tests.bench.rows import Row

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says of all benchmarks."""

    reference: bool = False  # heartlib takes turns with the native engine
    int8: str = "off"  # as HEARTMULA_INT8


class Worker:
    """A process of `tests.bench.worker`, as its caller uses it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._reply()  # it has loaded

    def __call__(self, command: str, *arguments: int) -> Row:
        assert self._process.stdin is not None
        print(json.dumps([command, arguments]), file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("bench: a worker died; what it said stands above")
        reply: Row = json.loads(line)
        return reply


@contextmanager
def worker(
    side: str, kind: str, checkpoint: Checkpoint, dtype: str, slots: int = 1, options: Options | None = None
) -> Iterator[Worker]:
    """Start a process for one measurement, so that the peak of memory belongs to that measurement alone."""
    python = os.environ.get("HEARTLIB_PYTHON") or sys.executable if side == "heartlib" else sys.executable
    command = [python, "-m", "tests.bench.worker", side, kind, str(checkpoint.path), dtype, str(slots)]
    if side == "native" and options is not None:
        command += ["--int8", options.int8]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()


@contextmanager
def checkout_side(
    checkout: Path, script: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[Callable[[str], float]]:
    """Start a script with this interpreter and the code of a checkout.

    Calling what is yielded gives the script a line and returns the number that it answers with. Raises `SystemExit` if
    the script dies.
    """
    with subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1", **(environment or {})},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        source, replies = process.stdin, process.stdout

        def measure(command: str) -> float:
            source.write(command + "\n")
            source.flush()
            line = replies.readline()
            if not line:
                raise SystemExit(f"bench: the side of {checkout} died; what it said stands above")
            return float(line)

        try:
            yield measure
        finally:
            source.close()  # a side that has servers stops them
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def device_name() -> str:
    """Name of the device that workers measure on, from another process.

    Raises `SystemExit` where PyTorch cannot use it; the process has said why.
    """
    if os.environ.get("BENCH_DEVICE", "cpu") == "cpu":
        return "cpu"
    command = [sys.executable, "-m", "tests.bench.device"]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    if process.returncode:
        raise SystemExit(process.returncode)
    return process.stdout.strip()
