"""Token tensors as safetensors files: int16 ``[8, T]``, the song that they belong to, and a checksum."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shared.errors import ObjectError
from shared.schema.base import SCHEMA


@dataclass(frozen=True, kw_only=True)
class TokenMeta:
    """Metadata of a token tensor."""

    job_id: str
    model: str
    seed: int
    first_frame: int = 0
    ended: bool = True  # false: a checkpoint of a song that is still being made


def pack(codes: np.ndarray, meta: TokenMeta) -> bytes:
    """Serialise int16 codes ``[8, T]``."""
    codes = np.ascontiguousarray(codes, dtype=np.int16)  # safetensors silently corrupts strided arrays
    metadata = {
        "schema": str(SCHEMA),
        "job_id": meta.job_id,
        "model": meta.model,
        "seed": str(meta.seed),
        "first_frame": str(meta.first_frame),
        "ended": str(meta.ended).lower(),
    }
    return save({"codes": codes}, metadata | {"sha256": _digest(codes, metadata)})


def unpack(data: bytes, job_id: str) -> tuple[np.ndarray, TokenMeta]:
    """Read codes ``[8, T]`` back. Raises `ObjectError` when they are damaged or of another song."""
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        codes = load(data)["codes"]
        meta = TokenMeta(
            job_id=metadata["job_id"],
            model=metadata["model"],
            seed=int(metadata["seed"]),
            first_frame=int(metadata["first_frame"]),
            ended=metadata["ended"] == "true",
        )
        digest = metadata.pop("sha256")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ObjectError("the token file is damaged: it cannot be read") from error
    if _digest(codes, metadata) != digest:
        raise ObjectError("the token file is damaged: its checksum does not match")
    if meta.job_id != job_id:
        raise ObjectError("the token file belongs to another song")
    if codes.dtype != np.int16 or codes.ndim != 2:
        raise ObjectError(f"the token file holds {codes.dtype} {list(codes.shape)}, not int16 [8, T]")
    return codes, meta


def _digest(codes: np.ndarray, metadata: dict[str, str]) -> str:
    """SHA-256 of the codes and their metadata."""
    text = json.dumps(metadata, sort_keys=True).encode()
    return hashlib.sha256(codes.tobytes() + text).hexdigest()
