"""The gate of a SwiGLU layer, elementwise."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Compute BLOCK outputs of row `program_id(0)` of ``gate_up [rows, 2 · width]``."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up_ptr + 2 * row * width + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up_ptr + (2 * row + 1) * width + at, mask=inside, other=0).to(tl.float32)
    # Rounded as PyTorch rounds: silu to the dtype, then the product.
    silu = tl.math.div_rn(gate, 1 + tl.exp(-gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + at, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Launch `silu_mul_kernel`; argument and result are those of the operator `silu_mul`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows, triton.cdiv(width, _BLOCK))
    silu_mul_kernel[grid](gate_up.contiguous(), out, width, BLOCK=_BLOCK, num_warps=4)
    return out
