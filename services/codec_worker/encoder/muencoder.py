"""MuEncoder: a mel spectrum → the acoustic and the semantic stream, from two depths of a conformer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.codec_worker.encoder.layers import (
    BatchNorm,
    FeedForward,
    GroupedConvolution,
    LayerNorm,
    attend,
    rope_table,
    rotate,
)
from services.codec_worker.model.linear import Linear
from shared.model.encoder_config import MU_LAYERS, ConformerConfig, MuEncoderConfig

ACOUSTIC_LAYERS = 2  # blocks before the acoustic stream; the semantic one comes after `MU_LAYERS`
FRAMES = 744  # of a chunk, at 25 Hz


class ImageConvolution(nn.Module):
    """A 3 × 3 convolution over mel bands and time, with a border of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, 3, 3, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[rows, bands, T, inputs]`` → ``[rows, bands / stride, T / stride, outputs]``."""
        image, kernel = x.permute(0, 3, 1, 2), self.weight.permute(0, 3, 1, 2)
        convolved = F.conv2d(image, kernel, self.bias, self.stride, padding=1)
        return convolved.permute(0, 2, 3, 1).contiguous()


class ImageBlock(nn.Module):
    """A residual block that halves bands and time."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = ImageConvolution(inputs, width, 2), BatchNorm(width)
        self.conv2, self.bn2 = ImageConvolution(width, width, 1), BatchNorm(width)
        self.conv3, self.bn3 = ImageConvolution(inputs, width, 2), BatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on ``[rows, bands, T, inputs]`` → ``[rows, bands / 2, T / 2, width]``."""
        inner = self.bn1(self.conv1(x)).relu_()
        inner = self.bn2(self.conv2(inner))  # what it came from is gone: these are the largest activations of all
        out: Tensor = inner.add_(self.bn3(self.conv3(x))).relu_()
        return out


class Stem(nn.Module):
    """Convolutions from a mel spectrum to the conformer's input, at a quarter of the frames."""

    def __init__(self, config: MuEncoderConfig) -> None:
        super().__init__()
        width = config.conv_dim
        self.conv = nn.ModuleList((ImageBlock(1, width), ImageBlock(width, width)))
        self.linear = Linear(width * -(-config.n_mels // 4), config.conformer_config.hidden_size)

    def forward(self, mel: Tensor) -> Tensor:
        """Turn ``mel [rows, 2976, bands]`` into ``[rows, 744, D]``, row by row to need less memory."""
        return torch.cat([self._row(row) for row in torch.split(mel, 1)])

    def _row(self, mel: Tensor) -> Tensor:
        x = mel.transpose(1, 2)[..., None].contiguous()  # [1, bands, T, 1]
        for block in self.conv:
            x = block(x)
        row: Tensor = self.linear(x.permute(0, 2, 3, 1).flatten(2))  # of each channel all bands
        return row


class RotaryAttention(nn.Module):
    """Attention whose positions turn its input before the projections of queries and keys, not these themselves."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q, self.linear_k = Linear(dim, dim), Linear(dim, dim)
        self.linear_v, self.linear_out = Linear(dim, dim), Linear(dim, dim)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Attend over ``[rows, T, D]``; keeps the shape."""
        heads = (self.heads, -1)
        turned = rotate(torch.unflatten(x, -1, heads), table).flatten(2)
        q, k, v = self.linear_q(turned), self.linear_k(turned), self.linear_v(x)
        attended: Tensor = self.linear_out(
            attend(q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads))
        )
        return attended


class ConvolutionModule(nn.Module):
    """The convolution of a conformer's block."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(dim)
        self.pointwise_conv1 = Linear(dim, 2 * dim, bias=False)
        self.depthwise_conv = GroupedConvolution(dim, kernel, dim, padding=kernel // 2, bias=False)
        self.batch_norm = BatchNorm(dim)
        self.pointwise_conv2 = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[rows, T, D]``; keeps the shape."""
        x = F.glu(self.pointwise_conv1(self.layer_norm(x)), dim=-1)
        x = F.silu(self.batch_norm(self.depthwise_conv(x)))
        convolved: Tensor = self.pointwise_conv2(x)
        return convolved


class SwishFeedForward(FeedForward):
    """The conformer's two linear layers with SiLU between them."""

    def forward(self, x: Tensor) -> Tensor:
        """Run on ``[rows, T, D]``; keeps the shape."""
        out: Tensor = self.output_dense(F.silu(self.intermediate_dense(x)))
        return out


class ConformerBlock(nn.Module):
    """A block of a conformer (Gulati et al. 2020): attention and convolution between two half feed-forwards."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim, inner = config.hidden_size, config.intermediate_size
        self.ffn1_layer_norm, self.ffn1 = LayerNorm(dim), SwishFeedForward(dim, inner)
        self.self_attn_layer_norm, self.self_attn = LayerNorm(dim), RotaryAttention(dim, config.num_attention_heads)
        self.conv_module = ConvolutionModule(dim, config.conv_depthwise_kernel_size)
        self.ffn2_layer_norm, self.ffn2 = LayerNorm(dim), SwishFeedForward(dim, inner)
        self.final_layer_norm = LayerNorm(dim)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Run the block on ``[rows, T, D]``; keeps the shape."""
        x = x + 0.5 * self.ffn1(self.ffn1_layer_norm(x))
        x = x + self.self_attn(self.self_attn_layer_norm(x), table)
        x = x + self.conv_module(x)
        x = x + 0.5 * self.ffn2(self.ffn2_layer_norm(x))
        out: Tensor = self.final_layer_norm(x)
        return out


class Conformer(nn.Module):
    """The blocks whose output is used, of those that the checkpoint has."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConformerBlock(config) for _ in range(MU_LAYERS))
        self.table: Tensor
        head_dim = config.hidden_size // config.num_attention_heads
        table = rope_table(head_dim, config.rotary_embedding_base, FRAMES)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the stem's ``[rows, 744, D]`` into the acoustic and the semantic stream, each of its shape."""
        acoustic = x
        for depth, layer in enumerate(self.layers, start=1):
            x = layer(x, self.table)
            if depth == ACOUSTIC_LAYERS:
                acoustic = x
        return acoustic, x


class MuEncoder(nn.Module):
    """Stem and conformer."""

    def __init__(self, config: MuEncoderConfig) -> None:
        super().__init__()
        self.conv = Stem(config)
        self.conformer = Conformer(config.conformer_config)
