"""Token tensors as safetensors files: int16 ``[8, T]``, the song that they belong to, and a checksum.

The file of a song that goes on from another one also holds the window of the codec in which the two part, as it was in
the other one: the codec makes its latents again and keeps those before the join.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shared.errors import ObjectError
from shared.schema.base import SCHEMA

_PROMPT = ("tags", "lyrics", "version")  # that only whole songs have, and those of earlier versions have not


@dataclass(frozen=True, kw_only=True, eq=False)
class EarlierWindow:
    """The codec's window in which a song parts from the one that it goes on from, as the latter had it."""

    window: int  # its index
    frames: int  # of the song, after which the two differ
    seed: int  # of its noise
    codes: np.ndarray  # int16 [8, length of a window]; beyond the song's end it begins again


@dataclass(frozen=True, kw_only=True)
class TokenMeta:
    """Metadata of a token tensor."""

    job_id: str
    model: str
    seed: int
    first_frame: int = 0
    ended: bool = True  # false: a checkpoint of a song that is still being made
    # Of a whole song, so that the file tells by itself how it was made:
    tags: str = ""
    lyrics: str = ""
    version: str = ""  # of this software
    earlier: tuple[EarlierWindow, ...] = ()  # in which it parts from others, and they from theirs; the oldest first


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
    metadata |= {name: text for name in _PROMPT if (text := getattr(meta, name))}
    arrays = {"codes": codes}
    if meta.earlier:
        metadata["earlier"] = json.dumps([[found.window, found.frames, found.seed] for found in meta.earlier])
        for number, found in enumerate(meta.earlier):
            arrays[f"earlier.{number}"] = np.ascontiguousarray(found.codes, dtype=np.int16)
    return save(arrays, metadata | {"sha256": _digest(arrays, metadata)})


def unpack(data: bytes, job_id: str) -> tuple[np.ndarray, TokenMeta]:
    """Read codes ``[8, T]`` back. Raises `ObjectError` when they are damaged or of another song."""
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        arrays = load(data)
        codes = arrays["codes"]
        meta = TokenMeta(
            job_id=metadata["job_id"],
            model=metadata["model"],
            seed=int(metadata["seed"]),
            first_frame=int(metadata["first_frame"]),
            ended=metadata["ended"] == "true",
            **{name: metadata.get(name, "") for name in _PROMPT},
            earlier=tuple(
                EarlierWindow(window=window, frames=frames, seed=seed, codes=arrays[f"earlier.{number}"])
                for number, (window, frames, seed) in enumerate(json.loads(metadata.get("earlier", "[]")))
            ),
        )
        digest = metadata.pop("sha256")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ObjectError("the token file is damaged: it cannot be read") from error
    if _digest(arrays, metadata) != digest:
        raise ObjectError("the token file is damaged: its checksum does not match")
    if meta.job_id != job_id:
        raise ObjectError("the token file belongs to another song")
    if codes.dtype != np.int16 or codes.ndim != 2:
        raise ObjectError(f"the token file holds {codes.dtype} {list(codes.shape)}, not int16 [8, T]")
    return codes, meta


def _digest(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 of the codes, then of the windows of other songs, and the metadata."""
    digest = hashlib.sha256(arrays["codes"].tobytes())
    for name in sorted(arrays.keys() - {"codes"}):
        digest.update(arrays[name].tobytes())
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()
