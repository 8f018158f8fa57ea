"""The Llama stack of which both the backbone and the depth decoder of HeartMuLa consist."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from services.tokenizer_worker.model.linear import Matrix, empty
from shared.model.checkpoint import Flavor

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
    """Rotate the pairs (2i, 2i+1) of ``x [rows, S, heads, h]``, in fp32; the dtype stays.

    `table` is ``[S, 1, h / 2]``, or ``[rows, S, 1, h / 2]`` where rows are at different positions.
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))  # [rows, S, heads, h / 2]
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019): fp32, cast back, then × scale."""
    return F.rms_norm(x.float(), scale.shape, eps=NORM_EPS).to(x.dtype) * scale


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one stack for the rows of one song. Entries that have not been written are zero."""

    keys: Tensor  # [layers, rows, KV heads, positions, h]
    values: Tensor  # same

    @classmethod
    def empty(cls, flavor: Flavor, rows: int, positions: int, dtype: torch.dtype, device: torch.device) -> "KVCache":
        # Not what happens to be in memory: a masked entry counts nothing, but nothing times infinity is not a number.
        shape = (flavor.num_layers, rows, flavor.num_kv_heads, positions, flavor.head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @staticmethod
    def size(flavor: Flavor, rows: int, positions: int, dtype: torch.dtype) -> int:
        """Bytes that `empty` with these arguments allocates."""
        return 2 * flavor.num_layers * rows * flavor.num_kv_heads * positions * flavor.head_dim * dtype.itemsize

    def rows(self, rows: slice) -> "KVCache":
        """A view of some rows, in the same memory."""
        return KVCache(self.keys[:, rows], self.values[:, rows])

    def copy_from(self, other: "KVCache", positions: int) -> None:
        """Copy the first positions of a cache with as many rows."""
        self.keys[:, :, :, :positions].copy_(other.keys[:, :, :, :positions], non_blocking=True)
        self.values[:, :, :, :positions].copy_(other.values[:, :, :, :positions], non_blocking=True)

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, ``[rows, KV heads, positions, h]`` both."""
        return zip(self.keys.unbind(0), self.values.unbind(0), strict=True)


@dataclass(frozen=True)
class Span:
    """The next positions of a song, equal for all layers: `start` … `end` − 1. They attend to those below `end`."""

    start: int
    end: int
    mask: Tensor | None  # bool [H / KV · S, end]: which of these positions; all of them without a mask


def attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of ``q [rows, heads, S, h]``; on CUDA by the memory-efficient kernel.

    Flash attention takes no mask. cuDNN makes a plan for every new shape, which takes longer than a prefill.
    """
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


Layer = tuple[Tensor, Tensor]
"""Keys and values of a song in one layer, ``[rows, KV heads, positions, h]`` both."""


class Block(nn.Module):
    """One pre-norm layer: grouped-query attention, then SwiGLU. Matrices that see the same input are one matrix."""

    def __init__(self, flavor: Flavor, dtype: torch.dtype, *, int8: bool) -> None:
        super().__init__()
        d, f, h = flavor.embed_dim, flavor.intermediate_dim, flavor.head_dim
        self.heads, self.kv_heads, self.head_dim = flavor.num_heads, flavor.num_kv_heads, h
        self.attention_norm = empty(d, dtype=dtype)
        self.qkv = Matrix((self.heads + 2 * self.kv_heads) * h, d, dtype, int8=int8)
        self.output = Matrix(d, self.heads * h, dtype, int8=int8)
        self.mlp_norm = empty(d, dtype=dtype)
        self.gate_up = Matrix(2 * f, d, dtype, int8=int8)
        self.down = Matrix(d, f, dtype, int8=int8)

    def forward(self, x: Tensor, table: Tensor, layers: Sequence[Layer], spans: Sequence[Span]) -> Tensor:
        """Run the block on ``x [rows, S, D]``; returns that shape, and writes S entries into the cache of each song.

        Of n songs, rows i, i + n, … are those of song i.
        """
        x = x + self.output(self._attend(rms_norm(x, self.attention_norm), table, layers, spans))
        gate, up = self.gate_up(rms_norm(x, self.mlp_norm)).chunk(2, dim=-1)  # [rows, S, F] each
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out

    def _attend(self, x: Tensor, table: Tensor, layers: Sequence[Layer], spans: Sequence[Span]) -> Tensor:
        rows, steps, _ = x.shape
        count = len(spans)
        qkv = self.qkv(x).contiguous().view(rows, steps, -1, self.head_dim)  # [rows, S, H + 2 KV, h]
        # Queries and keys are neighbours, so one rotation serves both.
        qk = rotate(qkv[:, :, : -self.kv_heads], table).transpose(1, 2)  # [rows, H + KV, S, h]
        q, k, v = qk[:, : self.heads], qk[:, self.heads :], qkv[:, :, -self.kv_heads :].transpose(1, 2)
        # The query heads that share a KV head sit side by side: taken as more queries of one head they need no copies
        # of the keys, which those kernels would make that know nothing of shared heads.
        q = q.reshape(rows, self.kv_heads, -1, self.head_dim)  # [rows, KV, H / KV · S, h]
        found = torch.empty_like(q)
        for index, ((keys, values), span) in enumerate(zip(layers, spans, strict=True)):
            keys[:, :, span.start : span.end] = k[index::count]
            values[:, :, span.start : span.end] = v[index::count]
            found[index::count] = attention(
                q[index::count], keys[:, :, : span.end], values[:, :, : span.end], span.mask
            )
        return found.view(rows, self.heads, steps, -1).transpose(1, 2).reshape(rows, steps, -1)


class Llama(nn.Module):
    """A causal stack with its final norm, without embeddings or heads."""

    rope: Tensor  # [positions, 1, h / 2] complex64
    positions: Tensor  # int64 [positions]: 0, 1, …

    def __init__(self, flavor: Flavor, positions: int, dtype: torch.dtype, *, int8: bool = False) -> None:
        super().__init__()
        self.shared = flavor.num_heads // flavor.num_kv_heads  # query heads a KV head
        self.blocks = nn.ModuleList(Block(flavor, dtype, int8=int8) for _ in range(flavor.num_layers))
        self.scale = empty(flavor.embed_dim, dtype=dtype)
        self.register_buffer("rope", rope_table(flavor.head_dim, positions), persistent=False)
        self.register_buffer("positions", torch.arange(positions, device="cpu"), persistent=False)

    def forward(self, x: Tensor, cache: KVCache, start: int) -> Tensor:
        """Run ``x [rows, S, D]`` at positions start … start + S − 1 through every block; the final norm is `norm`.

        A position sees those before it, in the cache or in `x`, and itself.
        """
        end, mask = start + x.shape[1], None
        if x.shape[1] > 1:  # a single position sees everything
            causal = self.positions[:end] <= self.positions[start:end, None]
            mask = causal.repeat(self.shared, 1)  # [H / KV · S, end], as the queries lie in a block
        return self._run(x, self.rope[start:end], [cache], [Span(start, end, mask)])

    def repeat(self, x: Tensor, cache: KVCache, count: int) -> None:
        """Write into the cache what ``x [rows, 1, D]`` at each of the positions 0 … count − 1 leaves there.

        Computed once: whatever weights attention gives to positions, values that are all alike add up to themselves. So
        hidden states are the same at every position, and keys but for their rotation, which at position 0 is none.
        """
        layers, rows, heads, _, width = cache.keys.shape
        once = KVCache(*cache.keys.new_zeros(2, layers, rows, heads, 1, width))
        self(x, once, 0)
        for key, keys in zip(once.keys, cache.keys, strict=True):  # a layer at a time: all of them take much memory
            turned = rotate(key.transpose(1, 2).expand(-1, count, -1, -1), self.rope[:count])  # [rows, count, KV, h]
            keys[:, :, :count] = turned.transpose(1, 2)
        cache.values[:, :, :, :count] = once.values

    def step(self, x: Tensor, caches: Sequence[KVCache], positions: Sequence[int]) -> Tensor:
        """Run one position of each of n songs through every block, ``x [rows, 1, D]`` → the same shape.

        Rows i, i + n, … are those of song i, in its own cache, at its own position.

        All but the attention is done for all rows at once, so that weights are read once; attention is done a song at a
        time, because then caches are as long as their songs and stay where they are.
        """
        spans = [Span(at, at + 1, None) for at in positions]
        return self._run(x, spread(self.rope[list(positions)][:, None], len(x)), caches, spans)

    def _run(self, x: Tensor, table: Tensor, caches: Sequence[KVCache], spans: Sequence[Span]) -> Tensor:
        for block, *layers in zip(self.blocks, *(cache.layers() for cache in caches), strict=True):
            x = block(x, table, layers, spans)
        return x

    def norm(self, x: Tensor) -> Tensor:
        """Apply the final norm to some positions: ``[…, D]`` → ``[…, D]``."""
        return rms_norm(x, self.scale)


def spread(x: Tensor, rows: int) -> Tensor:
    """Spread entries of songs, ``[songs, …]``, over rows, ``[rows, …]``: all songs, then the first of them once more.

    So lie the rows of a batch whose guided songs come first: conditional rows of all, unconditional rows of those.
    """
    return x if rows == len(x) else torch.cat((x, x[: rows - len(x)]))
