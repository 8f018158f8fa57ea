"""What Triton needs on this machine beside a driver: itself, and a C compiler for the stub that launches kernels."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

LEAST_CAPABILITY = (7, 5)
"""Compute capability from which on Triton compiles kernels: Turing's."""

# A header of Python and one of the C library, which a compiler's package does not always bring along.
_SOURCE = "#include <Python.h>\n#include <stdlib.h>\n"


@cache
def missing_compiler() -> str | None:
    """Say what Triton lacks to run kernels on this machine and what to install; None if it lacks nothing.

    Looks where Triton 3.4 to 3.7 look (triton/runtime/build.py): the compiler is CC, gcc or clang in this order, and
    the headers are those of the running Python. An empty file is checked once, some 50 ms; nothing is linked. The
    answer is kept for the life of the process.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: install PyTorch's build for CUDA, or `pip install triton`"
    compiler = os.environ.get("CC", shutil.which("gcc") or shutil.which("clang"))
    if compiler is None:
        return "no C compiler: install gcc and libc6-dev (or clang), or set CC to one"
    headers = Path(sysconfig.get_paths(_scheme())["include"])
    if not (headers / "Python.h").is_file():
        return f"Python.h is not in {headers}: install Python's headers (python3-dev, python3-devel)"
    command: list[str | Path] = [compiler, "-fsyntax-only", "-I", headers, "-x", "c", "-"]
    try:
        run = subprocess.run(command, input=_SOURCE, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the C compiler {compiler} cannot be run: {error}"
    if run.returncode:
        reason = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip())
        return f"the C compiler {compiler} cannot compile against Python.h ({reason}): install libc6-dev"
    return None


def _scheme() -> str:
    # Debian's own Python names folders below /usr/local, where its headers are not.
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme
