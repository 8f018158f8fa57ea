"""Exponential noise from counters: the plain path's integers exactly, its logarithm to the last bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_INCREMENT = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(z):
    """Outputs of SplitMix64 for values of its counter, uint64 both."""
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return z ^ (z >> 31)


@triton.jit
def noise_kernel(counters_ptr, out_ptr, vocabulary, BLOCK: tl.constexpr):
    """Compute BLOCK values of song `program_id(0)` in codebook `program_id(1)`."""
    song, book = tl.program_id(0), tl.program_id(1)
    code = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    seed = _mix(tl.load(counters_ptr + song).to(tl.uint64, bitcast=True))
    bits = _mix(seed + (book * vocabulary + code + 1).to(tl.uint64) * _INCREMENT)
    uniform = ((bits >> 41).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³
    row = (book * tl.num_programs(0) + song).to(tl.int64)
    tl.store(out_ptr + row * vocabulary + code, -tl.log(uniform), mask=code < vocabulary)


def noise(counters: Tensor, codebooks: int, vocabulary: int) -> Tensor:
    """Launch `noise_kernel`; arguments and result are those of the operator `noise`."""
    songs = counters.shape[0]
    out = torch.empty(codebooks, songs, vocabulary, dtype=torch.float32, device=counters.device)
    grid = (songs, codebooks, triton.cdiv(vocabulary, _BLOCK))
    noise_kernel[grid](counters, out, vocabulary, BLOCK=_BLOCK, num_warps=4)
    return out
