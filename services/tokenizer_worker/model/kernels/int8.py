"""Products with weights that are kept as int8 (W8A16)."""

from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from services.tokenizer_worker.model.kernels.operators import declare_launches


@custom_op("heartmula::int8_product", mutates_args=(), device_types="cpu")
def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``x [rows, K]`` times the transpose of ``weight`` int8 ``[N, K]``, times ``scale [N]``: ``[rows, N]``.

    Sums are in fp32 and rounded once, after the scale.
    """
    return (F.linear(x.float(), weight.float()) * scale.float()).to(x.dtype)


@int8_product.register_kernel("cuda")
def _on_cuda(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    from services.tokenizer_worker.model.kernels.triton_kernels import int8 as kernels

    return kernels.int8_product(x, weight, scale)


@int8_product.register_fake
def _shape(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


declare_launches(int8_product, lambda *_: 1)
