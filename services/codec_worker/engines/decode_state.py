"""Where the decoding of a song stands between two windows: all that the next window needs, fit to be stored."""

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shared.errors import ObjectError
from shared.schema.base import SCHEMA


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeState:
    """The state of a song between two windows. As made by ``DecodeState(seed=…)``: before the first."""

    seed: int  # of the song
    window: int = 0  # windows that were decoded: the index of the next
    samples: int = 0  # a channel, that were handed out until then; what came later is not part of this state
    codes: str = ""  # `digest` of the codes that those windows took
    context: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # [latents, channels], the last
    overlap: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), np.float32))  # [2, samples], not handed out

    def pack(self) -> bytes:
        """Serialise the state; `unpack` gives it back to the last bit."""
        metadata = {
            "schema": str(SCHEMA),
            "seed": str(self.seed),
            "window": str(self.window),
            "samples": str(self.samples),
            "codes": self.codes,
        }
        # safetensors silently corrupts strided arrays.
        arrays = {name: np.ascontiguousarray(getattr(self, name), np.float32) for name in ("context", "overlap")}
        return save(arrays, metadata | {"sha256": _checksum(arrays, metadata)})

    @classmethod
    def unpack(cls, data: bytes) -> "DecodeState":
        """Read a state back. Raises `ObjectError` when it is damaged."""
        try:
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            checksum, arrays = metadata.pop("sha256"), load(data)
            if _checksum(arrays, metadata) != checksum:
                raise ObjectError("the state of decoding is damaged: its checksum does not match")
            return cls(
                seed=int(metadata["seed"]),
                window=int(metadata["window"]),
                samples=int(metadata["samples"]),
                codes=metadata["codes"],
                context=arrays["context"],
                overlap=arrays["overlap"],
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ObjectError("the state of decoding is damaged: it cannot be read") from error


def digest(codes: np.ndarray) -> str:
    """SHA-256 of int16 codes ``[8, T]``."""
    return hashlib.sha256(np.ascontiguousarray(codes, np.int16).tobytes()).hexdigest()


def _checksum(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    parts = [json.dumps(metadata, sort_keys=True).encode()]
    for name in sorted(arrays):
        parts += [f"{name} {arrays[name].dtype} {arrays[name].shape}".encode(), arrays[name].tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()
