"""Run Triton kernels on the CPU, from the launching function on, in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


@contextmanager
def interpreted() -> Iterator[None]:
    """Let launches of kernels run in the interpreter, on tensors in host memory, one program after the other.

    TRITON_INTERPRET would do it for the whole process, and must be set before kernels are imported. What the
    interpreter does wrong is done right: it loses the carry when it rounds to bfloat16, and takes the bits of bfloat16
    for integers when it multiplies matrices and when it converts integers.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", _launch)
        patch.setattr(JITFunction, "__call__", _call)
        patch.setattr(interpreter, "_convert_float", _convert_float)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
        patch.setattr(interpreter.InterpreterBuilder, "create_si_to_fp", _from_integers)
        yield


def _launch(kernel: Any, *arguments: Any, **options: Any) -> None:
    interpreter.InterpretedFunction(kernel.fn).run(*arguments, **options)


def _call(helper: Any, *arguments: Any, **options: Any) -> Any:
    scope = interpreter._patch_lang(helper.fn)  # InterpretedFunction.__call__ does not undo it
    try:
        return interpreter.InterpretedFunction(helper.fn).rewrite()(*arguments, **options)
    finally:
        scope.restore()


_DTYPES = {tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, tl.float32: torch.float32}
_BITS = {tl.float16: np.uint16, tl.bfloat16: np.uint16, tl.float32: np.uint32}


def _convert_float(data: Any, source: Any, target: Any, _rounding: Any) -> Any:
    bits = torch.from_numpy(np.array(data, order="C").view(_BITS[source]))
    converted = bits.view(_DTYPES[source]).to(_DTYPES[target])
    return converted.view(torch.uint16 if target.primitive_bitwidth == 16 else torch.uint32).numpy()


def _dot(_builder: Any, a: Any, b: Any, d: Any, *_precision: Any) -> Any:
    left, right = (
        _convert_float(x.data, x.dtype.scalar, tl.float32, None).view(np.float32)
        if x.dtype.scalar in (tl.float16, tl.bfloat16)
        else x.data
        for x in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _from_integers(builder: Any, x: Any, target: Any) -> Any:
    # Exact for integers of up to 24 bits.
    return builder.create_fp_trunc(interpreter.TensorHandle(x.data.astype(np.float32), tl.float32), target)
