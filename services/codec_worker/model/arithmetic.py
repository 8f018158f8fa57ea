"""Arithmetic on CUDA, chosen where the codec computes. PyTorch allows TF32 in convolutions, not in products, and other
code may change either. On the CPU nothing here has an effect.

TF32 rounds the factors of float32 products to 10 bits of mantissa. docs/performance.md has what that does to a song.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Flash takes 16 bit, memory-efficient float32; products in the open what neither takes. Never cuDNN: on Hopper it
# makes a plan for every new shape, a third of a second each.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_BY_OPERATION = hasattr(torch.backends, "fp32_precision")  # since PyTorch 2.9, where the older flags are deprecated


@contextmanager
def products(*, tf32: bool) -> Iterator[None]:
    """Compute float32 products and convolutions on CUDA with TF32 factors or, without `tf32`, whole ones."""
    before = _precision()
    _set_precision(("tf32", "tf32") if tf32 else ("ieee", "ieee"))
    try:
        yield
    finally:
        _set_precision(before)


def fused_attention() -> AbstractContextManager[None]:
    """Compute attention on CUDA by a kernel of its own, and never by cuDNN."""
    return sdpa_kernel(_ATTENTION)


def _precision() -> tuple[str, str]:
    """Precision of matrix products, and of convolutions."""
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if _BY_OPERATION:
        return cuda.fp32_precision, cudnn.conv.fp32_precision
    return _named(cuda.allow_tf32), _named(cudnn.allow_tf32)


def _set_precision(precision: tuple[str, str]) -> None:
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if _BY_OPERATION:
        cuda.fp32_precision, cudnn.conv.fp32_precision = precision
    else:
        cuda.allow_tf32, cudnn.allow_tf32 = (name == "tf32" for name in precision)


def _named(tf32: bool) -> str:
    return "tf32" if tf32 else "ieee"
