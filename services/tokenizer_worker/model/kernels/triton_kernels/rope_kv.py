"""Kernel of the operator `rope_kv`."""

import triton
import triton.language as tl
from torch import Tensor

from services.tokenizer_worker.model.kernels.row_table import Field
from services.tokenizer_worker.model.kernels.triton_kernels.caches import cache_of, tile_columns

_LENGTH = tl.constexpr(Field.LENGTH.value)


@triton.jit(do_not_specialize=["layer"])
def _rope_kv(
    qkv,
    rope,
    table,
    queries,
    layer,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr,
    PADDED: tl.constexpr,
):
    row, part, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    length = tl.load(table + _LENGTH * rows + row)
    position = tl.maximum(length - 1, 0)
    column = tl.arange(0, PADDED)
    x = tl.load(qkv + (row * (HEADS + 2 * KV_HEADS) + part) * H + column, column < H)
    if part < HEADS + KV_HEADS:  # a query or a key
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (PADDED // 2, 2)))
        angle = tl.load(rope + position * H + column, column < H)
        cosine, sine = tl.split(tl.reshape(angle, (PADDED // 2, 2)))
        rotated = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        x = tl.reshape(rotated, (PADDED,)).to(qkv.dtype.element_ty)
    if part < HEADS:
        tl.store(queries + (row * HEADS + part) * H + column, tl.where(length > 0, x, 0.0), column < H)
    elif length > 0:
        kv_head = (part - HEADS) % KV_HEADS
        cache = cache_of(qkv, table, row, rows, layer, kv_head, part >= HEADS + KV_HEADS, H)
        tl.store(cache + position * H + column, x, column < H)


def rope_kv(qkv: Tensor, rope: Tensor, table: Tensor, layer: int, heads: int, kv_heads: int) -> Tensor:
    """Launch the kernel of the operator `rope_kv`, on the current device and stream: one program a row and head.

    A program moves a single vector of h elements, so it is one warp. What it saves is launches, not bytes: of those a
    layer's weights are a thousand times more. Raises the ValueErrors of `tile_columns`.
    """
    rows, parts = len(qkv), heads + 2 * kv_heads
    width = qkv.shape[1] // parts
    columns = tile_columns(width, table, rows)
    queries = qkv.new_empty(rows, heads, width)
    _rope_kv[rows, parts](
        qkv.contiguous(), rope.contiguous(), table, queries, layer, heads, kv_heads, width, columns, num_warps=1
    )
    return queries
