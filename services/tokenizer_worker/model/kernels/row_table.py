"""The table of rows: where each row of a batch has its cache, and how far it has come."""

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from math import prod
from typing import Protocol

import torch
from torch import Tensor

HEAD_MULTIPLE = 8
"""A head's width has to be a multiple of it: so vectors in a cache begin at multiples of 16 bytes."""


class Field(IntEnum):
    """Lines of a row table, int64 ``[len(Field), rows]``."""

    KEYS = 0  # address of the row's keys in layer 0, [KV heads, capacity, h] contiguous
    VALUES = 1  # the same of its values
    LAYER = 2  # elements from a layer's keys to those of the next, as from values to values
    CAPACITY = 3  # positions in the cache
    LENGTH = 4  # positions that the row has, the present one included; 0: the row is empty


class Cache(Protocol):
    """Keys and values of some rows, ``[layers, rows, KV heads, capacity, h]`` both, contiguous."""

    @property
    def keys(self) -> Tensor: ...

    @property
    def values(self) -> Tensor: ...


def row_table(rows: Sequence[tuple[Cache, int, int] | None]) -> Tensor:
    """Build a table, int64 ``[len(Field), rows]`` in host memory; each row is a cache, its row in it, and a length.

    None is an empty row. The table holds addresses alone: caches have to be kept for as long as it is used.
    """
    table = torch.zeros(len(Field), len(rows), dtype=torch.int64)
    for index, row in enumerate(rows):
        if row is not None:
            cache, within, length = row
            keys, values = cache.keys[:, within], cache.values[:, within]
            line = (address(keys), address(values), keys.stride(0), keys.shape[2], length)
            table[:, index] = torch.tensor(line)
    return table


def address(tensor: Tensor) -> int:
    """Address of a tensor's first element."""
    return tensor.data_ptr()


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
