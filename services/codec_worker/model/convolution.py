"""Convolution of sequences whose width comes last in memory, where it takes half the time on a CPU."""

from torch import Tensor
from torch.nn import functional as F

from shared.model.matrix_product import linear


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: int = 1, padding: int = 0, stride: int = 1
) -> Tensor:
    """Convolve ``x [rows, T, inputs]`` with weight ``[outputs, kernel, inputs]`` → ``[rows, T', outputs]``."""
    if weight.shape[1] == stride == 1:
        return linear(x, weight[:, 0], bias, sequence=True)
    # As an image of one row, because only images may have their width last.
    image, kernel = x[:, None].permute(0, 3, 1, 2), weight[:, None].permute(0, 3, 1, 2)
    return F.conv2d(image, kernel, bias, (1, stride), (0, padding), (1, dilation)).permute(0, 2, 3, 1)[:, 0]
