"""The Llama stack that both the backbone and the depth decoder of HeartMuLa are made of."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.checkpoint import Flavor

NORM_EPS = 1e-5
ROPE_BASE = 500_000.0
# Llama 3 scaling: wavelengths up to TRAINED / HIGH positions are kept, those beyond TRAINED / LOW are stretched.
ROPE_FACTOR, ROPE_LOW, ROPE_HIGH, ROPE_TRAINED = 32.0, 1.0, 4.0, 8192.0


def rope_frequencies(head_dim: int) -> Tensor:
    """Angular frequency of each rotated pair, ``[head_dim / 2]`` fp32, in radians a position.

    Su et al. 2021 (RoFormer), eq. 15, with the wavelength-dependent scaling of Llama 3.1.
    """
    f = ROPE_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    wavelength = 2 * math.pi / f
    keep = ((ROPE_TRAINED / wavelength - ROPE_LOW) / (ROPE_HIGH - ROPE_LOW)).clamp(0, 1)  # 1: as it is, 0: stretched
    return (1 - keep) * f / ROPE_FACTOR + keep * f


def rope_table(head_dim: int, positions: int) -> Tensor:
    """``e^(i · position · frequency)``, ``[positions, 1, head_dim / 2]`` complex64; the 1 broadcasts over heads."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32, device="cpu"), rope_frequencies(head_dim))
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of ``x [rows, S, heads, h]`` by ``table [S, 1, h / 2]``, in fp32; the dtype stays."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))  # [rows, S, heads, h / 2]
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019): fp32, cast back, then × scale."""
    return F.rms_norm(x.float(), scale.shape, eps=NORM_EPS).to(x.dtype) * scale


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one stack for the rows of one song; entries at positions not yet written are garbage."""

    keys: Tensor  # [layers, rows, KV heads, positions, h]
    values: Tensor  # same

    @classmethod
    def empty(cls, flavor: Flavor, rows: int, positions: int, dtype: torch.dtype, device: torch.device) -> "KVCache":
        shape = (flavor.num_layers, rows, flavor.num_kv_heads, positions, flavor.head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    @staticmethod
    def size(flavor: Flavor, rows: int, positions: int, dtype: torch.dtype) -> int:
        """Bytes that `empty` with these arguments allocates."""
        return 2 * flavor.num_layers * rows * flavor.num_kv_heads * positions * flavor.head_dim * dtype.itemsize

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, ``[rows, KV heads, positions, h]`` both."""
        return zip(self.keys.unbind(0), self.values.unbind(0), strict=True)


class Block(nn.Module):
    """One pre-norm layer: grouped-query attention, then SwiGLU. Matrices that see the same input are one matrix."""

    def __init__(self, flavor: Flavor, dtype: torch.dtype) -> None:
        super().__init__()
        d, f, h = flavor.embed_dim, flavor.intermediate_dim, flavor.head_dim
        self.heads, self.kv_heads, self.head_dim = flavor.num_heads, flavor.num_kv_heads, h
        self.attention_norm = empty(d, dtype=dtype)
        self.qkv = empty((self.heads + 2 * self.kv_heads) * h, d, dtype=dtype)
        self.output = empty(d, self.heads * h, dtype=dtype)
        self.mlp_norm = empty(d, dtype=dtype)
        self.gate_up = empty(2 * f, d, dtype=dtype)
        self.down = empty(d, f, dtype=dtype)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, start: int, table: Tensor, mask: Tensor | None
    ) -> Tensor:
        """``x [rows, S, D]`` at positions start … start + S − 1 → the same shape; writes S entries of the cache."""
        normed = rms_norm(x, self.attention_norm)
        x = x + F.linear(self._attend(normed, keys, values, start, table, mask), self.output)
        gate, up = F.linear(rms_norm(x, self.mlp_norm), self.gate_up).chunk(2, dim=-1)  # [rows, S, F] each
        return x + F.linear(F.silu(gate) * up, self.down)

    def _attend(
        self, x: Tensor, keys: Tensor, values: Tensor, start: int, table: Tensor, mask: Tensor | None
    ) -> Tensor:
        rows, steps, _ = x.shape
        end = start + steps
        qkv = F.linear(x, self.qkv).view(rows, steps, -1, self.head_dim)  # [rows, S, H + 2 KV, h]
        # Queries and keys are neighbours, so one rotation serves both.
        qk = rotate(qkv[:, :, : -self.kv_heads], table)
        q, k = qk[:, :, : self.heads], qk[:, :, self.heads :]
        keys[:, :, start:end] = k.transpose(1, 2)
        values[:, :, start:end] = qkv[:, :, -self.kv_heads :].transpose(1, 2)
        # The query heads that share a KV head sit side by side: taken as more queries of one head they need no copies
        # of the keys, which those kernels would make that know nothing of shared heads.
        q = q.transpose(1, 2).reshape(rows, self.kv_heads, -1, self.head_dim)  # [rows, KV, H / KV · S, h]
        seen = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
        return seen.reshape(rows, self.heads, steps, -1).transpose(1, 2).reshape(rows, steps, -1)


class Llama(nn.Module):
    """A causal stack with its final norm, without embeddings or heads."""

    rope: Tensor  # [positions, 1, h / 2] complex64

    def __init__(self, flavor: Flavor, positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shared = flavor.num_heads // flavor.num_kv_heads  # query heads a KV head
        self.blocks = nn.ModuleList(Block(flavor, dtype) for _ in range(flavor.num_layers))
        self.scale = empty(flavor.embed_dim, dtype=dtype)
        self.register_buffer("rope", rope_table(flavor.head_dim, positions), persistent=False)

    def forward(self, x: Tensor, cache: KVCache, start: int) -> Tensor:
        """Run ``x [rows, S, D]`` at positions start … start + S − 1 through every block; the final norm is `norm`.

        A position sees those before it, in the cache or in `x`, and itself.
        """
        end = start + x.shape[1]
        table, mask = self.rope[start:end], None
        if x.shape[1] > 1:  # a single position sees everything
            causal = torch.ones(x.shape[1], end, dtype=torch.bool, device=x.device).tril(start)
            mask = causal.repeat(self.shared, 1)  # [H / KV · S, end], as the queries lie in a block
        for block, (keys, values) in zip(self.blocks, cache.layers(), strict=True):
            x = block(x, keys, values, start, table, mask)
        return x

    def norm(self, x: Tensor) -> Tensor:
        """The final norm, for those positions that are wanted: ``[…, D]`` → the same shape."""
        return rms_norm(x, self.scale)


def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A weight that is yet to be loaded. Its memory is only reserved: pages are taken as they are written."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
