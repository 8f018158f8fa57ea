"""Root-mean-square norms: one program a row, whose sum stays in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def norm_kernel(x_ptr, scale_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Normalise row `program_id(0)` of ``x [rows, WIDTH]``."""
    start = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    x = tl.load(x_ptr + start + at, mask=inside, other=0).to(tl.float32)
    _store_norm(x, scale_ptr, out_ptr + start, eps, WIDTH, BLOCK)


@triton.jit
def add_norm_kernel(x_ptr, delta_ptr, scale_ptr, total_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Add row `program_id(0)` of x and delta, and normalise the sum as it is stored."""
    start = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    x = tl.load(x_ptr + start + at, mask=inside, other=0).to(tl.float32)
    delta = tl.load(delta_ptr + start + at, mask=inside, other=0).to(tl.float32)
    total = (x + delta).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + start + at, total, mask=inside)
    _store_norm(total.to(tl.float32), scale_ptr, out_ptr + start, eps, WIDTH, BLOCK)


@triton.jit
def _store_norm(x, scale_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    scale = tl.load(scale_ptr + at, mask=inside, other=0).to(tl.float32)
    mean = tl.math.div_rn(tl.sum(x * x, 0), float(WIDTH))
    # Rounded as PyTorch rounds: the norm to the dtype, then the product. 16-bit products are exact in fp32 before that.
    y = (x * tl.rsqrt(mean + eps)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + at, (y * scale).to(out_ptr.dtype.element_ty), mask=inside)


def _launch_sizes(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Launch `norm_kernel`; arguments and result are those of the operator `norm`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    norm_kernel[(x.shape[0],)](x.contiguous(), scale, out, eps, **_launch_sizes(x.shape[1]))
    return out


def add_norm(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch `add_norm_kernel`; arguments and result are those of the operator `add_norm`."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    out = torch.empty_like(total)
    sizes = _launch_sizes(x.shape[1])
    add_norm_kernel[(x.shape[0],)](x.contiguous(), delta.contiguous(), scale, total, out, eps, **sizes)
    return total, out
