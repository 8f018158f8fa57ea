"""Arrays and text in one safetensors file, with a checksum over both."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shared.errors import ObjectError
from shared.schema.base import SCHEMA


@dataclass(frozen=True)
class CheckedArrays:
    """Named arrays and named texts."""

    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]

    def pack(self) -> bytes:
        """Serialise both; `unpack` gives them back to the last bit."""
        # safetensors silently corrupts strided arrays.
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        metadata = {**self.metadata, "schema": str(SCHEMA)}
        return save(arrays, metadata | {"sha256": _checksum(arrays, metadata)})

    @classmethod
    def unpack(cls, data: bytes, what: str) -> "CheckedArrays":
        """Read them back. Raises `ObjectError`, which begins with `what` it is, when they are damaged."""
        try:
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            checksum, arrays = metadata.pop("sha256"), load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ObjectError(f"{what} is damaged: it cannot be read") from error
        if _checksum(arrays, metadata) != checksum:
            raise ObjectError(f"{what} is damaged: its checksum does not match")
        return cls(arrays, metadata)


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    parts = [json.dumps(metadata, sort_keys=True).encode()]
    for name in sorted(arrays):
        parts += [f"{name} {arrays[name].dtype} {arrays[name].shape}".encode(), arrays[name].tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()
