"""Linear layers with weights in the model's dtype or in int8."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.tokenizer_worker.model.kernels import int8_product
from services.tokenizer_worker.model.kernels.compiler import LEAST_CAPABILITY, missing_compiler
from shared.model.matrix_product import linear

# int8 on the CPU: PyTorch's own kernel up to so many rows; beyond, it is cheaper to convert the weights first.
_INT8_ROWS = 32
# On CUDA the operator reads the weights once for every 32 rows, hardly slower each time while they are in L2.
_INT8_ROWS_CUDA = 64


class Matrix(nn.Module):
    """A weight ``[N, K]`` in `dtype`, or with `int8` in weight-only int8 with a scale a row, ``[N]`` in `dtype`."""

    scale: Tensor | None

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype, *, int8: bool = False) -> None:
        super().__init__()
        self.shape = torch.Size((outputs, inputs))
        self.weight = empty(outputs, inputs, dtype=torch.int8 if int8 else dtype)
        self.register_parameter("scale", empty(outputs, dtype=dtype) if int8 else None)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[rows, S, K]`` → ``[rows, S, N]``, not always contiguous."""
        return linear(x, self.weight) if self.scale is None else _linear_int8(x, self.weight, self.scale)

    @torch.no_grad()
    def fill(self, tensor: Tensor, start: int = 0) -> None:
        """Write rows from `start` on, ``[n, K]`` of any floating dtype.

        int8 is symmetric, and exact at 0; a row's largest value is 127 of its scale. Values are divided by the scale as
        it is stored, so that its own rounding costs nothing.
        """
        rows = slice(start, start + len(tensor))
        if self.scale is None:
            self.weight[rows] = tensor
            return
        step = tensor.abs().amax(1).float() / 127
        self.scale[rows] = step.clamp_(min=torch.finfo(self.scale.dtype).tiny)
        self.weight[rows] = (tensor / self.scale[rows, None].float()).round_().clamp_(-127, 127)


def _linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and len(rows) <= _INT8_ROWS_CUDA and _has_kernels(x.device):
        out: Tensor = int8_product(rows, weight, scale)
    elif not x.is_cuda and len(rows) <= _INT8_ROWS:
        out = torch._weight_int8pack_mm(rows.contiguous(), weight, scale)
    else:
        out = F.linear(rows, weight.to(x.dtype)) * scale
    return out.view(*x.shape[:-1], -1)


def _has_kernels(device: torch.device) -> bool:
    return missing_compiler() is None and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Reserve a weight that will be loaded later. Pages of its memory are taken only as they are written."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
