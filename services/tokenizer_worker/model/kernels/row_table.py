"""The table of rows: where each row of a batch has its cache, and how far it has come."""

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from math import prod

import torch
from torch import Tensor


class Field(IntEnum):
    """Lines of a row table, int64 ``[len(Field), rows]``."""

    KEYS = 0  # address of the row's keys in layer 0, [KV heads, capacity, h] contiguous
    VALUES = 1  # the same of its values
    LAYER = 2  # elements from a layer's keys to those of the next, as from values to values
    CAPACITY = 3  # positions in the cache
    LENGTH = 4  # positions that the row has, the present one included; 0: the row is empty


def row_table(rows: Sequence[tuple[Tensor, Tensor, int]], device: torch.device) -> Tensor:
    """Build a table, int64 ``[len(Field), rows]``, of keys, values ``[layers, KV heads, capacity, h]`` and a length.

    The table holds addresses alone: the caches have to be kept elsewhere for as long as it is used.
    """
    lines = [(k.data_ptr(), v.data_ptr(), k.stride(0), k.shape[2], length) for k, v, length in rows]
    return torch.tensor(lines, dtype=torch.int64).view(-1, len(Field)).T.contiguous().to(device)


def tensor_at(address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor in host memory at an address, for the plain paths on the CPU."""
    memory = (ctypes.c_uint8 * (prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def caches_of(
    table: Tensor, row: int, layer: int, kv_heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of a row in a layer, ``[KV heads, capacity, width]`` both, in host memory."""
    keys, values, stride, capacity, _ = (int(line) for line in table[:, row])
    offset, shape = layer * stride * dtype.itemsize, (kv_heads, capacity, width)
    return tensor_at(keys + offset, shape, dtype), tensor_at(values + offset, shape, dtype)
