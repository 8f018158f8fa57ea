"""Kernels of the operator `attend`: split-KV decoding (Dao et al. 2023, Flash-Decoding)."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.tokenizer_worker.model.kernels.row_table import Field
from services.tokenizer_worker.model.kernels.triton_kernels.caches import cache_of, tile_columns

_LENGTH = tl.constexpr(Field.LENGTH.value)


@triton.jit(do_not_specialize=["layer"])
def _attend(
    q,
    table,
    partial,
    sums,
    layer,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Attention of the queries of one KV head of a row over one split of its positions, by an online softmax.

    With one split `partial` is the result. With more it is ``[rows, heads, SPLITS, H]`` before the division by the sum
    of weights, and `sums` holds the largest score and that sum, ``[rows, heads, SPLITS, 2]``, both fp32.
    """
    tl.static_assert(GROUP <= 16)
    row, kv_head, split, rows = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0)
    length = tl.load(table + _LENGTH * rows + row).to(tl.int32)
    # Each split takes as many blocks, and the last ones what there is of them: less, or nothing.
    run = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    first = split * run
    end = tl.minimum(first + run, length)

    column = tl.arange(0, PADDED)
    member = tl.arange(0, 16)  # of the group of query heads, padded to the rows of a tensor core's tile
    head = row * HEADS + kv_head * GROUP + member
    is_query = (member < GROUP)[:, None] & (column < H)[None, :]
    query = tl.load(q + head[:, None] * H + column[None, :], is_query, other=0.0)
    keys = cache_of(q, table, row, rows, layer, kv_head, False, H)
    values = cache_of(q, table, row, rows, layer, kv_head, True, H)

    largest = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, PADDED), tl.float32)
    for start in range(first, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        is_entry = (position < end)[:, None] & (column < H)[None, :]  # what lies behind the row's end is never read
        offset = position[:, None] * H + column[None, :]
        k = tl.load(keys + offset, is_entry, other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((position < end)[None, :], score, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, 1))  # finite, as position `start` is below `end`
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(largest - higher)
        v = tl.load(values + offset, is_entry, other=0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(weight, 1)
        largest = higher

    if SPLITS == 1:
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(partial + head[:, None] * H + column[None, :], acc, is_query)
    else:
        place = head * SPLITS + split
        tl.store(sums + place * 2, largest, member < GROUP)
        tl.store(sums + place * 2 + 1, total, member < GROUP)
        if first < end:  # the result of an empty split is never read
            tl.store(partial + place[:, None] * H + column[None, :], acc, is_query)


@triton.jit
def _join(partial, sums, joined, H: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """Join the splits of one query head of a row."""
    head = tl.program_id(0)
    place = head * SPLITS + tl.arange(0, SPLITS)
    column = tl.arange(0, PADDED)
    largest = tl.load(sums + place * 2)
    total = tl.load(sums + place * 2 + 1)
    is_part = (total > 0)[:, None] & (column < H)[None, :]
    part = tl.load(partial + place[:, None] * H + column[None, :], is_part, other=0.0)
    highest = tl.max(largest, 0)
    weight = tl.exp2(largest - tl.where(total > 0, highest, 0.0))  # 0 of an empty split
    total = tl.sum(weight * total, 0)
    result = tl.sum(weight[:, None] * part, 0) / tl.where(total == 0, 1.0, total)
    tl.store(joined + head * H + column, result, column < H)


def attend(q: Tensor, table: Tensor, layer: int, kv_heads: int, splits: int) -> Tensor:
    """Launch the kernels of the operator `attend`, on the current device and stream; `splits` is a power of two.

    Every key and value is read once, for all queries of its group. With splits, 4 · h bytes a split and query head are
    written and read besides: a tenth of the former at 2,048 positions, 32 splits and groups of three. So the time to
    expect is that of the bytes, once enough programs run. Raises the ValueErrors of `tile_columns`.
    """
    rows, heads, width = q.shape
    columns = tile_columns(width, table, rows)
    joined = q.new_empty(rows, heads * width)
    partial, sums = joined, joined
    if splits > 1:
        partial = q.new_empty(rows, heads, splits, width, dtype=torch.float32)
        sums = q.new_empty(rows, heads, splits, 2, dtype=torch.float32)
    _attend[rows, kv_heads, splits](
        q.contiguous(),
        table,
        partial,
        sums,
        layer,
        width**-0.5 * math.log2(math.e),  # weights are powers of two, which the device has an instruction for
        heads,
        heads // kv_heads,
        width,
        columns,
        SPLITS=splits,
        **_tiling(columns),
    )
    if splits > 1:
        _join[rows * heads,](partial, sums, joined, width, columns, splits, num_warps=4)
    return joined


def _tiling(columns: int) -> dict[str, int]:
    """Positions a step, and how many warps share them and how many steps are on their way: fixed, nothing is timed.

    Two steps of 32 positions of 128 columns are on their way while a third is computed: 37 KiB in bf16 and 74 KiB in
    fp32, of the 99 KiB that a program can have on consumer cards, so in bf16 two programs run on each of their
    multiprocessors and six on one of an H100. Small steps also divide short songs among more programs. Four warps
    fetch a step of keys in four loads of 16 bytes a thread. Wider heads are the depth decoder's, which has no more than
    a frame's codebooks behind it: one step, and nothing to fetch ahead.
    """
    if columns <= 128:
        return {"BLOCK": 32, "num_warps": 4, "num_stages": 3}
    return {"BLOCK": 16, "num_warps": 4, "num_stages": 1}
