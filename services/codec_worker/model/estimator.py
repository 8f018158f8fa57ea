"""The estimator of the flow's velocity: two transformer stacks modulated by time (adaLN-single).

The modulation follows PixArt-α (Chen et al. 2023), the blocks are Llama's without causality.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.codec_worker.model.convolution import convolve
from services.codec_worker.model.linear import Linear
from shared.model.checkpoint import CodecConfig

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0
TIME_WIDTH = 512
TIME_SCALE = 1000.0
MLP_MULTIPLE = 256
MAX_LATENTS = 744  # of a window


def time_features(t: Tensor) -> Tensor:
    """Times ``[steps]`` fp32 → ``[steps, 512]``: cosines, then sines, of 1000 · t · 10000^(−i/256)."""
    half = TIME_WIDTH // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(ROPE_BASE) * index / half) * TIME_SCALE
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope_table(head_dim: int) -> Tensor:
    """``e^(i · position / base^(2j/h))``, complex64 ``[MAX_LATENTS, 1, h / 2]``, on the host.

    Always in fp32: positions in bfloat16, as the reference makes them, are off by up to 5 %.
    """
    host = torch.device("cpu")  # even where the weights around it are only described
    frequency = ROPE_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=host) / head_dim)
    angles = torch.outer(torch.arange(MAX_LATENTS, dtype=torch.float32, device=host), frequency)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of ``x [rows, T, heads, h]``; fp32 inside."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


class Projection(nn.Module):
    """Projection of latents: a convolution over three of them, scaled by 3^−½, then a linear layer."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, 3, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype))
        self.linear = Linear(outputs, outputs, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Project ``[rows, T, inputs]`` to ``[rows, T, outputs]``, both of any dtype."""
        x = convolve(x.to(self.weight.dtype), self.weight, self.bias, padding=1)
        projected: Tensor = self.linear(x.mul_(3**-0.5))
        return projected


class TimeEmbedding(nn.Module):
    """Embedding ``e`` of a time and, from it, the six modulation vectors that all blocks of a stack share."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(TIME_WIDTH, dim)
        self.linear_2 = Linear(dim, dim)
        self.linear = Linear(dim, 6 * dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Turn time features ``[steps, 512]`` into modulation ``[steps, 6, D]`` and embedding ``[steps, 1, D]``."""
        e = self.linear_2(F.silu(self.linear_1(features)))
        return self.linear(F.silu(e)).unflatten(-1, (6, -1)), e[:, None]


class Block(nn.Module):
    """A transformer block: attention over the whole window, then SwiGLU, both between modulation and a gate.

    Matrices are of `dtype`; what is added up and normed stays in fp32.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        width = MLP_MULTIPLE * math.ceil(int(8 * dim / 3) / MLP_MULTIPLE)
        self.heads = heads
        self.attn_norm = nn.Parameter(torch.empty(dim))
        self.qkv = Linear(dim, 3 * heads * head_dim, bias=False, dtype=dtype)
        self.o_proj = Linear(heads * head_dim, dim, bias=False, dtype=dtype)
        self.mlp_norm = nn.Parameter(torch.empty(dim))
        self.gate = Linear(dim, width, bias=False, dtype=dtype)
        self.up = Linear(dim, width, bias=False, dtype=dtype)
        self.down = Linear(width, dim, bias=False, dtype=dtype)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def forward(self, x: Tensor, modulation: Tensor, table: Tensor) -> Tensor:
        """Run the block on ``x [rows, T, D]`` with this step's modulation ``[6, D]``, all fp32; keeps the shape."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.scale_shift_table + modulation
        x = x.addcmul(gate, self._attend(self._norm(x, self.attn_norm, shift, scale), table))
        h = self._norm(x, self.mlp_norm, mlp_shift, mlp_scale)
        return x.addcmul(mlp_gate, self.down(F.silu(self.gate(h)).mul(self.up(h))))

    def _norm(self, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Modulated norm in the dtype of the matrices: RMSNorm(x) · (1 + scale) + shift."""
        return F.rms_norm(x, weight.shape, weight * (1 + scale), NORM_EPS).add_(shift).to(self.down.weight.dtype)

    def _attend(self, x: Tensor, table: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [rows, T, heads, h]
        q, k = rotate(q, table), rotate(k, table)
        seen = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        attended: Tensor = self.o_proj(seen.transpose(1, 2).flatten(-2))
        return attended


@dataclass(frozen=True)
class Modulation:
    """Tensors that depend on time alone, for every step of a schedule; computed once, used by every window."""

    first: Tensor  # [steps, 6, D]
    first_embedding: Tensor  # [steps, 1, D]
    second: Tensor  # [steps, 6, 2D]
    second_embedding: Tensor  # [steps, 1, 2D]

    def to(self, device: torch.device) -> "Modulation":
        """Copy of the tensors on a device."""
        return Modulation(*(getattr(self, field.name).to(device) for field in fields(self)))


class Estimator(nn.Module):
    """Velocity of the latents at a time, given latents, context and conditioning."""

    def __init__(self, config: CodecConfig, dtype: torch.dtype) -> None:
        super().__init__()
        heads, head_dim, inputs = config.num_attention_heads, config.attention_head_dim, config.in_channels
        dim, wide = heads * head_dim, 2 * heads * head_dim
        self.proj_in = Projection(inputs, dim, dtype)
        self.transformer_blocks = nn.ModuleList(Block(dim, heads, head_dim, dtype) for _ in range(config.num_layers))
        self.connection_proj = Projection(inputs + dim, wide, dtype)
        self.transformer_blocks_2 = nn.ModuleList(
            Block(wide, heads, 2 * head_dim, dtype) for _ in range(config.num_layers_2)
        )
        self.proj_out = Projection(wide, config.out_channels, dtype)
        self.adaln_single = TimeEmbedding(dim)
        self.adaln_single_2 = TimeEmbedding(wide)
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        self.scale_shift_table_2 = nn.Parameter(torch.empty(2, wide))
        self.table: Tensor
        self.wide_table: Tensor
        self.register_buffer("table", rope_table(head_dim), persistent=False)
        self.register_buffer("wide_table", rope_table(2 * head_dim), persistent=False)

    def modulation(self, times: Tensor) -> Modulation:
        """Modulation for the times ``[steps]`` of a schedule, on the device of the time embeddings."""
        features = time_features(times)
        return Modulation(*self.adaln_single(features), *self.adaln_single_2(features))

    def forward(self, inputs: Tensor, modulation: Modulation, step: int) -> Tensor:
        """``[rows, T, in_channels]`` fp32 = latents | context | conditioning → velocity ``[rows, T, 256]`` fp32.

        T may not exceed `MAX_LATENTS`.
        """
        positions = inputs.shape[1]
        s = self.proj_in(inputs).float()  # [rows, T, D]
        for block in self.transformer_blocks:
            s = block(s, modulation.first[step], self.table[:positions])
        s = _final(s, self.scale_shift_table, modulation.first_embedding[step])
        x = self.connection_proj(torch.cat((inputs, s), dim=-1)).float()  # [rows, T, 2D]
        for block in self.transformer_blocks_2:
            x = block(x, modulation.second[step], self.wide_table[:positions])
        velocity: Tensor = self.proj_out(_final(x, self.scale_shift_table_2, modulation.second_embedding[step]))
        return velocity.float()


def _final(x: Tensor, table: Tensor, embedding: Tensor) -> Tensor:
    """Layer norm without weights of its own, modulated by the stack's table + embedding."""
    shift, scale = table + embedding
    return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, NORM_EPS)
