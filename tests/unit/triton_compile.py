"""Compile Triton kernels for cards that are not there: finds what the interpreter cannot, types above all."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import JITFunction, create_function_from_signature

# Shared memory that one program can have, in bytes, by compute capability (CUDA C++ Programming Guide, table 27).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Compiled:
    """What a card would be given for one launch, and what a program of it takes there."""

    name: str
    ptx: str
    shared: int  # bytes of shared memory
    registers: int  # a thread
    spilled: int  # bytes of local memory a thread: what found no register


def compile_launches(call: Callable[[], object], capability: int) -> list[Compiled]:
    """Compile every kernel that `call` launches, as a launch on a card of this compute capability would.

    Nothing is run, and `call` may use tensors on "meta", which have no contents. Raises what Triton raises on source
    that it cannot compile.
    """
    compiled = []

    def compile_instead(fn: Any, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        compiled.append(_compile(fn, arguments, options, GPUTarget("cuda", capability, 32)))

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setenv("TRITON_CACHE_DIR", folder)
        patch.setattr(JITFunction, "run", compile_instead)
        call()
    return compiled


def _compile(fn: Any, arguments: tuple[Any, ...], options: dict[str, Any], target: GPUTarget) -> Compiled:
    # The steps of JITFunction.run, which asks the driver for the target.
    backend = make_backend(target)
    bind = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, rest = bind(*arguments, **options, debug=False, instrumentation_mode="")
    keywords = {**options, "debug": False, "instrumentation_mode": ""}
    parsed, signature, constants, attributes = fn._pack_args(backend, keywords, bound, specialization, rest)
    kernel = compile_source(ASTSource(fn, signature, constants, attributes), target, parsed.__dict__)
    registers, spilled = _resources(kernel.asm["cubin"])
    return Compiled(kernel.metadata.name, kernel.asm["ptx"], kernel.metadata.shared, registers, spilled)


def _resources(binary: bytes) -> tuple[int, int]:
    path = Path(knobs.cache.dir) / "resources.cubin"
    path.write_bytes(binary)
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    path.unlink()
    stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))  # type: ignore[index]
    return int(re.search(r"REG:(\d+)", usage)[1]), stack + local  # type: ignore[index]
