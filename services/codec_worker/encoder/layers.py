"""What the encoder's networks have in common. Activations are fp32 ``[rows, T, width]``."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.codec_worker.model.convolution import convolve
from services.codec_worker.model.linear import Linear

NORM_EPS = 1e-5  # of every norm


class LayerNorm(nn.Module):
    """Layer norm with weight and bias over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Norm ``[…, width]``."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, NORM_EPS)


class BatchNorm(nn.Module):
    """Batch norm with the statistics of its training: a scale and a shift a channel (Ioffe & Szegedy 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.running_mean = nn.Parameter(torch.empty(width), requires_grad=False)
        self.running_var = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Norm ``[…, width]`` in place."""
        scale = self.weight * (self.running_var + NORM_EPS).rsqrt()
        return x.mul_(scale).add_(self.bias - self.running_mean * scale)


class Convolution(nn.Module):
    """A convolution over time."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, kernel, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[rows, T, inputs]`` → ``[rows, T', outputs]``."""
        return convolve(x, self.weight, self.bias, padding=self.padding, stride=self.stride)


class GroupedConvolution(nn.Module):
    """A convolution over time of which each group of channels sees its own inputs only."""

    def __init__(self, width: int, kernel: int, groups: int, *, padding: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width // groups, kernel))  # as F.conv1d takes it
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.groups, self.padding = groups, padding

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[rows, T, width]`` → ``[rows, T', width]``."""
        over_time = x.transpose(1, 2)
        return F.conv1d(over_time, self.weight, self.bias, padding=self.padding, groups=self.groups).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.intermediate_dense = Linear(width, inner)
        self.output_dense = Linear(inner, width)


def rope_table(dims: int, base: float, positions: int) -> Tensor:
    """Cosines and sines of ``position / base^(2i / dims)``, fp32 ``[2, positions, 1, dims / 2]``, on the host."""
    host = torch.device("cpu")  # even where the weights around it are only described
    frequency = 1 / base ** (torch.arange(0, dims, 2, dtype=torch.float32, device=host) / dims)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32, device=host), frequency)
    return torch.stack((angles.cos(), angles.sin()))[:, :, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate dimensions i and i + dims / 2 of ``x [rows, T, heads, h]`` by its positions, for the first `dims` of h.

    Rotary position embedding (Su et al. 2021) with its pairs half the dimensions apart; `table` is a `rope_table`.
    """
    cos, sin = table
    half = cos.shape[-1]
    a, b, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over all positions of ``[rows, T, heads, h]``: ``[rows, T, heads · h]``.

    `bias` ``[rows, heads, T, T]`` is added to the scores, which are divided by √h.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def pairs(x: Tensor) -> Tensor:
    """Mean of frames 2i and 2i + 1: ``[rows, 2T, width]`` at 50 Hz → ``[rows, T, width]`` at 25 Hz."""
    return torch.unflatten(x, 1, (-1, 2)).mean(dim=2)
