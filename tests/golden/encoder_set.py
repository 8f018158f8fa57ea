"""The encoder's golden data: vectors recorded from the reference, and the audio of their cases."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from shared.model.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class EncoderSet:
    """A folder of vectors; its README.md describes them."""

    facts: dict[str, Any]
    vectors: dict[str, Tensor]
    checkpoint: Checkpoint

    @classmethod
    def open(cls) -> "EncoderSet":
        """Read the folder named by `HEARTMULA_GOLDEN_ENCODER`, or the one beside this file."""
        folder = encoder_folder()
        facts = json.loads((folder / "encoder.json").read_text())
        return cls(facts, load_file(folder / "encoder.safetensors"), open_checkpoint(folder / "ckpt"))

    def tolerance(self, kind: str) -> float:
        """How far from the recorded vectors another implementation may be."""
        return float(self.facts["tolerances"][kind])

    def audio(self, name: str) -> np.ndarray:
        """The audio of a case, float32 ``[channels, samples]``, checked against what was recorded."""
        case = self.facts["cases"][name]
        stored = self.vectors.get(f"{name}.audio")
        audio = made(case) if stored is None else stored.numpy()
        assert audio.shape == (case["channels"], case["samples"])
        assert audio[:, 1000:1004].tolist() == case["audio_head"]
        assert hashlib.sha256(audio.astype("<i2").tobytes()).hexdigest() == case["audio_sha256"]
        return np.asarray(audio.astype(np.float32) / 32768)


def encoder_folder() -> Path:
    """Folder of the encoder's golden data."""
    return Path(os.environ.get("HEARTMULA_GOLDEN_ENCODER") or Path(__file__).parent / "encoder")


def made(case: dict[str, Any]) -> np.ndarray:
    """Audio by the formula in the set's README.md, int16 ``[channels, samples]``."""
    hold, increments = case["audio"]["hold"], np.array(case["audio"]["increments"], np.int64)
    n = np.arange(case["samples"], dtype=np.int64)
    i, channels = n // hold, []
    for c in range(case["channels"]):
        f = increments[(5 * i + 3 * c) % len(increments)]
        partials = []
        for k in (1, 2, 3):
            p = (n * f * k) % 2**32 // 2**16 - 2**15
            partials.append(p * (2**15 - abs(p)) // 2**13)
        s = (5 * partials[0] + 3 * partials[1] + 2 * partials[2]) * (hold - n % hold) // hold // 16
        h = ((2 * n + c) * 2654435761) % 2**32
        h = ((h ^ h // 2**15) * 668265263) % 2**32
        h ^= h // 2**13
        channels.append(s + (h // 2**16 - 2**15) * (1 + (7 * i + 4 * c) % 11) // 64)
    return np.stack(channels).astype(np.int16)
