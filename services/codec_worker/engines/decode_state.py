"""Where the decoding of a song stands between two windows: all that the next window needs, fit to be stored."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from services.codec_worker.checked_arrays import CheckedArrays
from services.codec_worker.engines.kept_windows import NOTHING_KEPT, KeptWindows
from shared.errors import ObjectError

_WHAT = "the state of decoding"


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeState:
    """The state of a song between two windows. As made by ``DecodeState(seed=…)``: before the first."""

    seed: int  # of the song
    window: int = 0  # windows that were decoded: the index of the next
    samples: int = 0  # a channel, that were handed out until then; what came later is not part of this state
    taken: int = 0  # codes that those windows took, from the song's first on
    codes: str = ""  # `digest` of those codes
    kept: str = ""  # digest of the `KeptWindows` with which they were decoded
    context: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # [latents, channels], the last
    overlap: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), np.float32))  # [2, samples], not handed out

    def continues(self, codes: np.ndarray, kept: KeptWindows = NOTHING_KEPT) -> bool:
        """Whether int16 codes ``[8, T]`` begin with those that were decoded, and the same was `kept`."""
        if not self.window:
            return True
        return codes.shape[1] >= self.taken and (digest(codes[:, : self.taken]), kept.digest) == (self.codes, self.kept)

    def pack(self) -> bytes:
        """Serialise the state; `unpack` gives it back to the last bit."""
        metadata = {
            "seed": str(self.seed),
            "window": str(self.window),
            "samples": str(self.samples),
            "taken": str(self.taken),
            "codes": self.codes,
            "kept": self.kept,
        }
        arrays = {name: np.asarray(getattr(self, name), np.float32) for name in ("context", "overlap")}
        return CheckedArrays(arrays, metadata).pack()

    @classmethod
    def unpack(cls, data: bytes) -> "DecodeState":
        """Read a state back. Raises `ObjectError` when it is damaged."""
        found = CheckedArrays.unpack(data, _WHAT)
        metadata, arrays = found.metadata, found.arrays
        try:
            return cls(
                seed=int(metadata["seed"]),
                window=int(metadata["window"]),
                samples=int(metadata["samples"]),
                taken=int(metadata["taken"]),
                codes=metadata["codes"],
                kept=metadata.get("kept", ""),  # states of earlier versions have none
                context=arrays["context"],
                overlap=arrays["overlap"],
            )
        except (ValueError, KeyError) as error:
            raise ObjectError(f"{_WHAT} is not of this version: {error}") from error


def digest(codes: np.ndarray) -> str:
    """SHA-256 of int16 codes ``[8, T]``."""
    return hashlib.sha256(np.ascontiguousarray(codes, np.int16).tobytes()).hexdigest()
