"""Products of activations with a weight matrix, on a CPU in the way that its instruction set does fastest.

The way follows from the instruction set, the dtype and the shapes, never from a measurement at run time: ways differ in
the last bits, and a seed must give the same song at every start. docs/performance.md has the measurements.
"""

from enum import Enum, auto
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


class Way(Enum):
    """A way of multiplying ``x [rows, K]`` by the transpose of ``W [N, K]``."""

    LINEAR = auto()  # F.linear
    TURNED = auto()  # W · xᵀ, the large matrix first
    VECTOR = auto()  # torch.mv, for a single row
    ONEDNN = auto()  # oneDNN's inner product, where F.linear takes MKL's
    WIDENED = auto()  # in float32, parts of W converted one after the other


# From so many rows on, each in its way. AMX and CPUs that were not measured have the last two.
_WAYS: dict[tuple[str, torch.dtype], tuple[tuple[int, Way], ...]] = {
    ("AVX2", torch.float32): ((1, Way.ONEDNN), (2, Way.TURNED), (5, Way.ONEDNN)),
    ("AVX512", torch.float32): ((1, Way.ONEDNN), (2, Way.TURNED), (5, Way.ONEDNN)),
    ("AVX2", torch.bfloat16): ((1, Way.VECTOR), (2, Way.TURNED), (8, Way.WIDENED)),
    ("AVX512", torch.bfloat16): ((1, Way.LINEAR), (32, Way.TURNED), (65, Way.LINEAR)),
    ("", torch.float32): ((1, Way.LINEAR), (3, Way.TURNED), (33, Way.LINEAR)),
    ("", torch.bfloat16): ((1, Way.VECTOR), (2, Way.TURNED), (129, Way.LINEAR)),
}
MANY = 1 << 10  # rows; more are multiplied in no other way
# MKL is fast with a few turned rows in float32 only while all their values are no more than these.
_TURNED_VALUES = {"AVX2": 6144, "AVX512": 4096}
# Multiplications of a product in float32 below which the 10 µs of a call of oneDNN are not worth it.
_SMALL = 1 << 20
# Weights that are converted at once: 4 MB in float32, which stay in a cache and whose memory is used again.
_WIDENED_VALUES = 1 << 20


def instruction_set() -> str:
    """Name what this CPU may be asked for: AMX, AVX512, AVX2, or another name by PyTorch.

    It honours ``ATEN_CPU_CAPABILITY``, which limits PyTorch's own kernels.
    """
    name = torch.backends.cpu.get_cpu_capability()
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "without oneDNN"
    return "AMX" if name == "AVX512" and torch.cpu._is_amx_tile_supported() else name


@cache
def choose(instructions: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> Way:
    """Choose the way for ``x [rows, inputs]`` and ``W [outputs, inputs]`` on a CPU with these instructions."""
    ways = _WAYS.get((instructions, dtype)) or _WAYS.get(("", dtype), ())
    if (instructions, dtype) in _WAYS and dtype == torch.float32 and rows * inputs * outputs < _SMALL:
        return Way.LINEAR
    way = next((way for first, way in reversed(ways) if rows >= first), Way.LINEAR)
    if way is Way.TURNED and dtype == torch.float32 and rows * inputs > _TURNED_VALUES.get(instructions, rows * inputs):
        return Way.ONEDNN
    return way


INSTRUCTIONS = instruction_set()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, sequence: bool = False) -> Tensor:
    """``x […, K]`` times the transpose of ``weight [N, K]``, plus ``bias [N]``: ``[…, N]``, not always contiguous.

    All are of one floating dtype and on one device. Rows of a `sequence` are always multiplied as many rows are, also
    where its last part has few; the result is contiguous. With gradients it is F.linear.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    way = choose(INSTRUCTIONS, x.dtype, MANY if sequence else len(rows), rows.shape[1], len(weight))
    return _multiply(rows, weight, bias, way).view(*x.shape[:-1], -1)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
    match way:
        case Way.LINEAR:
            return F.linear(x, weight, bias)
        case Way.ONEDNN:
            return _onednn(x, weight, bias)
        case Way.WIDENED:
            out = _widened(x, weight)
        case Way.VECTOR:
            out = torch.mv(weight, x[0])[None]
        case Way.TURNED:
            out = (weight @ x.T).T
    return out if bias is None else out + bias


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    out, x = x.new_empty(len(x), len(weight)), x.float()
    step = max(1, _WIDENED_VALUES // weight.shape[1])
    for part, columns in zip(torch.split(weight, step), torch.split(out, step, dim=1), strict=True):
        columns.copy_(_onednn(x, part.float()))
    return out
