"""Rotation of queries and keys, and the entry of a position into the caches."""

import torch
from torch import Tensor
from torch.library import custom_op

from services.tokenizer_worker.model.kernels.operators import declare_launches
from services.tokenizer_worker.model.kernels.row_table import Field, caches_of


@custom_op("heartmula::rope_kv", mutates_args=(), device_types="cpu")
def rope_kv(qkv: Tensor, rope: Tensor, table: Tensor, layer: int, heads: int, kv_heads: int) -> Tensor:
    """Rotate the queries and keys of one position of each row, and write keys and values into the row's cache.

    ``qkv [rows, (heads + 2 · kv_heads) · h]`` holds queries, keys and values; ``rope [positions, h / 2, 2]`` fp32
    cosine and sine of each pair (2i, 2i + 1); `table` is a `row_table`, whose lengths tell the position: the last one.
    Rotation is in fp32, its result in the dtype of `qkv`. Returns the queries, ``[rows, heads, h]``; those of an empty
    row are 0, and nothing is written for it.
    """
    rows = len(qkv)
    parts = qkv.view(rows, heads + 2 * kv_heads, -1)
    width = parts.shape[-1]
    position = (table[Field.LENGTH] - 1).clamp(min=0)
    cosine, sine = rope[position][:, None].unbind(-1)  # [rows, 1, h / 2]
    even, odd = parts[:, : heads + kv_heads].float().view(rows, heads + kv_heads, -1, 2).unbind(-1)
    rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2).to(qkv.dtype)
    for row, length in enumerate(table[Field.LENGTH].tolist()):
        if length:
            keys, values = caches_of(table, row, layer, kv_heads, width, qkv.dtype)
            keys[:, length - 1] = rotated[row, heads:]
            values[:, length - 1] = parts[row, heads + kv_heads :]
    return rotated[:, :heads] * (table[Field.LENGTH] > 0)[:, None, None]


@rope_kv.register_kernel("cuda")
def _on_cuda(qkv: Tensor, rope: Tensor, table: Tensor, layer: int, heads: int, kv_heads: int) -> Tensor:
    from services.tokenizer_worker.model.kernels.triton_kernels import rope_kv as kernels

    return kernels.rope_kv(qkv, rope, table, layer, heads, kv_heads)


@rope_kv.register_fake
def _shape(qkv: Tensor, rope: Tensor, table: Tensor, layer: int, heads: int, kv_heads: int) -> Tensor:
    return qkv.new_empty(len(qkv), heads, qkv.shape[1] // (heads + 2 * kv_heads))


declare_launches(rope_kv, lambda *_: 1)
