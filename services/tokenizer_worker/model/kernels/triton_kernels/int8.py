"""Products with int8 weights (W8A16): weights are read as one byte each and converted in registers.

Every program sums its own tile over the whole of K, so results do not depend on the order in which programs end. K is
not split among programs: the narrowest matrix of a layer (N = 3,072) makes 192 programs for up to 16 rows, with 12 kB
of weights on the way in each. That is 2.4 MB in all, about what bandwidth times latency is on an H100 (3.35 TB/s times
0.7 µs), and twice that of a consumer card.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def int8_product_kernel(
    x_ptr, weight_ptr, scale_ptr, out_ptr, rows, outputs, inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute tile (`program_id(0)`, `program_id(1)`) of the product, ``[BLOCK_M, BLOCK_N]``."""
    # Programs of the same weights are neighbours, so all but the first find them in L2.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + m[:, None] * inputs + k[None, :]
    weight_at = weight_ptr + n[:, None].to(tl.int64) * inputs + k[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        inside = k[None, :] < inputs - start
        x = tl.load(x_at + start, mask=(m[:, None] < rows) & inside, other=0)
        weight = tl.load(weight_at + start, mask=(n[:, None] < outputs) & inside, other=0).to(x.dtype)  # exactly
        sums = tl.dot(x, weight.T, sums, input_precision="ieee")
    scale = tl.load(scale_ptr + n, mask=n < outputs, other=0).to(tl.float32)
    out = (sums * scale[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * outputs + n[None, :], out, mask=(m[:, None] < rows) & (n[None, :] < outputs))


def tile(rows: int, outputs: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a tile and of its program. They follow from shapes alone, so equal calls give equal sums.

    Tiles are narrow where there are few outputs, so that all multiprocessors have work. They are wider where there are
    many and where there are more rows, because every program reads its rows of x again, from L2.
    """
    if dtype == torch.float32:  # without tensor cores: exact products of fp32
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    if rows <= 16 and outputs <= 4096:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 2, "num_stages": 4}
    wide = 32 if outputs <= 8192 else 64
    return {
        "BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": wide, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4
    }  # fmt: skip


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Launch `int8_product_kernel`; arguments and result are those of the operator `int8_product`."""
    rows, (outputs, inputs) = x.shape[0], weight.shape
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    sizes = tile(rows, outputs, x.dtype)
    grid = (triton.cdiv(rows, sizes["BLOCK_M"]), triton.cdiv(outputs, sizes["BLOCK_N"]))
    int8_product_kernel[grid](x.contiguous(), weight, scale, out, rows, outputs, inputs, **sizes)
    return out
