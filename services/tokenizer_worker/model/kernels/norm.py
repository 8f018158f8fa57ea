"""Root-mean-square norms (Zhang & Sennrich 2019), also of a sum."""

from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from services.tokenizer_worker.model.kernels.operators import declare_launches


@custom_op("heartmula::norm", mutates_args=(), device_types="cpu")
def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Norm of ``x [rows, D]``: x / √(mean(x²) + eps) in fp32, rounded to the dtype of `x`, then times ``scale [D]``."""
    return F.rms_norm(x.float(), scale.shape, eps=eps).to(x.dtype) * scale


@norm.register_kernel("cuda")
def _norm_on_cuda(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    from services.tokenizer_worker.model.kernels.triton_kernels import norm as kernels

    return kernels.norm(x, scale, eps)


@norm.register_fake
def _norm_shape(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("heartmula::add_norm", mutates_args=(), device_types="cpu")
def add_norm(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of ``x`` and ``delta``, ``[rows, D]`` in their dtype, and its `norm`."""
    total = x + delta
    return total, F.rms_norm(total.float(), scale.shape, eps=eps).to(x.dtype) * scale


@add_norm.register_kernel("cuda")
def _add_norm_on_cuda(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from services.tokenizer_worker.model.kernels.triton_kernels import norm as kernels

    return kernels.add_norm(x, delta, scale, eps)


@add_norm.register_fake
def _add_norm_shape(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


declare_launches(norm, lambda *_: 1)
declare_launches(add_norm, lambda *_: 1)
