"""What tells one codec's audio, and one encoder's codes, from another's."""

import hashlib
import os
from pathlib import Path

import msgspec

from shared.model.checkpoint import Checkpoint

_END = 64 * 1024  # bytes at the end of each file of weights that are looked at: reading all would take seconds


def identity_of(engine: str, checkpoint: Checkpoint, steps: int, guidance: float) -> str:
    """The identity of a codec: its weights, as far as the ends of their files tell, and each setting that is heard.

    Not the data type, which follows from a worker's card: workers with different cards go on with each other's songs.

    Raises `OSError` when the checkpoint is gone.
    """
    return (
        f"{engine} {checkpoint.codec_path.name} {_weights(checkpoint.codec_path)}, {steps} steps, "
        f"guidance {guidance:g}, {checkpoint.codec.sample_rate} Hz"
    )


def encoder_identity(engine: str, checkpoint: Checkpoint) -> str:
    """The identity of an encoder: its networks and the codec whose codebooks it uses.

    Raises `OSError` when the checkpoint is gone.
    """
    config = msgspec.json.encode(checkpoint.encoder)
    encoder, codec = checkpoint.encoder_path, checkpoint.codec_path
    return f"{engine} {encoder.name} {_digest(config, encoder)}, {codec.name} {_weights(codec)}"


def _weights(folder: Path) -> str:
    return _digest((folder / "config.json").read_bytes(), folder)


def _digest(config: bytes, folder: Path) -> str:
    found = hashlib.sha256(config)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            file.seek(-min(size, _END), os.SEEK_END)
            found.update(file.read())
    return found.hexdigest()[:16]
