"""The gate of a SwiGLU layer (Shazeer 2020)."""

from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from services.tokenizer_worker.model.kernels.operators import declare_launches


@custom_op("heartmula::silu_mul", mutates_args=(), device_types="cpu")
def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of ``[rows, 2 · F]``, gate first: ``[rows, F]``. silu is rounded to the dtype, as by PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@silu_mul.register_kernel("cuda")
def _on_cuda(gate_up: Tensor) -> Tensor:
    from services.tokenizer_worker.model.kernels.triton_kernels import swiglu as kernels

    return kernels.silu_mul(gate_up)


@silu_mul.register_fake
def _shape(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


declare_launches(silu_mul, lambda *_: 1)
