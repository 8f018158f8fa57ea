"""What the kernels that read and write caches share."""

import triton
import triton.language as tl

from services.tokenizer_worker.model.kernels.row_table import Field

_KEYS = tl.constexpr(Field.KEYS.value)
_VALUES = tl.constexpr(Field.VALUES.value)
_LAYER = tl.constexpr(Field.LAYER.value)
_CAPACITY = tl.constexpr(Field.CAPACITY.value)


@triton.jit
def cache_of(like, table, row, rows, layer, kv_head, values, H: tl.constexpr):
    """Pointer, of the type of `like`, to the keys or `values` of a row's KV head in a layer, ``[capacity, H]``.

    That the address is a multiple of 16 bytes is promised (see `padded`), because loads and stores of more than one
    element need to know it, and of an address out of a table nothing is known. Offsets are int64, as the table's lines.
    """
    address = tl.load(table + tl.where(values, _VALUES, _KEYS) * rows + row)
    stride = tl.load(table + _LAYER * rows + row)
    capacity = tl.load(table + _CAPACITY * rows + row)
    pointer = address.to(like.dtype) + (layer * stride + kv_head * capacity * H)
    return tl.multiple_of(pointer, 16)


def padded(width: int) -> int:
    """Columns of a tile that holds vectors of `width` elements: a power of two, and 16 at least, which `tl.dot` needs.

    Raises ValueError where vectors would not begin at multiples of 16 bytes.
    """
    if width % 8:
        raise ValueError(f"a head dimension has to be a multiple of 8: {width}")
    columns: int = triton.next_power_of_2(max(16, width))
    return columns
