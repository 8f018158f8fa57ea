"""What the kernels that read and write caches share."""

import triton
import triton.language as tl
from torch import Tensor

from services.tokenizer_worker.model.kernels.row_table import HEAD_MULTIPLE, Field

_KEYS = tl.constexpr(Field.KEYS.value)
_VALUES = tl.constexpr(Field.VALUES.value)
_LAYER = tl.constexpr(Field.LAYER.value)
_CAPACITY = tl.constexpr(Field.CAPACITY.value)


@triton.jit
def cache_of(like, table, row, rows, layer, kv_head, values, H: tl.constexpr):
    """Pointer, of the type of `like`, to the keys or `values` of a row's KV head in a layer, ``[capacity, H]``.

    The address is promised to be a multiple of 16 bytes (see `tile_columns`): loads and stores of more than one element
    need to know it, and of an address out of a table nothing is known. Offsets are int64, as the table's lines.
    """
    address = tl.load(table + tl.where(values, _VALUES, _KEYS) * rows + row)
    stride = tl.load(table + _LAYER * rows + row)
    capacity = tl.load(table + _CAPACITY * rows + row)
    pointer = address.to(like.dtype) + (layer * stride + kv_head * capacity * H)
    return tl.multiple_of(pointer, 16)


def tile_columns(width: int, table: Tensor, rows: int) -> int:
    """Columns of a tile that holds vectors of `width` elements: a power of two, and 16 at least, which `tl.dot` needs.

    Raises ValueError where vectors would not begin at multiples of 16 bytes, or where a table is not one of so many
    rows, in whose place the kernels would read other memory as addresses.
    """
    if width % HEAD_MULTIPLE:
        raise ValueError(f"a head dimension has to be a multiple of {HEAD_MULTIPLE}: {width}")
    if table.shape != (len(Field), rows) or not table.is_contiguous():
        raise ValueError(f"{rows} rows need a contiguous table of as many, not {tuple(table.shape)}")
    columns: int = triton.next_power_of_2(max(16, width))
    return columns
