"""Attention of one position of each row over the row's own cache."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from services.tokenizer_worker.model.kernels.operators import declare_launches
from services.tokenizer_worker.model.kernels.row_table import Field, caches_of

_PROGRAMS = 4 * 132  # as many as an H100 has multiprocessors, times what hides the latency of memory
_MOST_SPLITS = 32
_LEAST_POSITIONS = 32  # of a split: what a program takes in one step


def splits_for(rows: int, kv_heads: int, positions: int) -> int:
    """Programs that share a row's positions in `attend`, a power of two from 1 to 32; a row has at most `positions`.

    Few rows alone do not occupy a card: one guided song has 2 rows · 8 KV heads, and an H100 132 multiprocessors, each
    of which needs several programs to keep its share of the memory's bandwidth busy. From 32 guided songs on they do,
    and joining splits would only cost. The answer depends on shapes alone, never on lengths or on a card: so a graph
    keeps it, and equal songs get equal sums everywhere.
    """
    splits = min(_MOST_SPLITS, _PROGRAMS // (rows * kv_heads), positions // _LEAST_POSITIONS)
    return 1 << (max(1, splits).bit_length() - 1)


@custom_op("heartmula::attend", mutates_args=(), device_types="cpu")
def attend(q: Tensor, table: Tensor, layer: int, kv_heads: int, splits: int) -> Tensor:
    """Grouped-query attention of ``q [rows, heads, h]``, each row over the first LENGTH positions of its own cache.

    `table` is a `row_table`; query head j uses KV head j // (heads / kv_heads); scores are scaled by h^−½. On CUDA a
    row's positions are divided among `splits` programs, whose results a second kernel joins (split-KV decoding, Dao et
    al. 2023). Returns ``[rows, heads · h]`` in the dtype of `q`; 0 for an empty row.
    """
    rows, heads, width = q.shape
    found = torch.zeros_like(q)
    for row, length in enumerate(table[Field.LENGTH].tolist()):
        if length:
            keys, values = caches_of(table, row, layer, kv_heads, width, q.dtype)
            grouped = q[row].view(1, kv_heads, heads // kv_heads, width)
            seen = F.scaled_dot_product_attention(grouped, keys[None, :, :length], values[None, :, :length])
            found[row] = seen.view(heads, width)
    return found.view(rows, heads * width)


@attend.register_kernel("cuda")
def _on_cuda(q: Tensor, table: Tensor, layer: int, kv_heads: int, splits: int) -> Tensor:
    from services.tokenizer_worker.model.kernels.triton_kernels import attention as kernels

    return kernels.attend(q, table, layer, kv_heads, splits)


@attend.register_fake
def _shape(q: Tensor, table: Tensor, layer: int, kv_heads: int, splits: int) -> Tensor:
    return q.new_empty(len(q), q.shape[1] * q.shape[2])


declare_launches(attend, lambda q, table, layer, kv_heads, splits: 1 if splits == 1 else 2)
