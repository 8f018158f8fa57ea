"""What every format's encoder has in common."""

from typing import Protocol

import numpy as np


class Encoder(Protocol):
    """Makes a file of 16-bit samples: a header, and bytes that follow each other and never change.

    The same samples make the same bytes, however they are cut.
    """

    header: bytes  # what a file begins with while it grows; players take it for a stream of unknown length

    def encode(self, pcm: np.ndarray) -> bytes:
        """Take the next int16 ``[samples, channels]``; returns the bytes that can be made by now."""

    def finish(self) -> tuple[bytes, bytes]:
        """Return the last bytes, and the header of the finished file, as long as `header`."""

    def close(self) -> None:
        """Let go of what the encoder holds; a file that is not finished by then is worth nothing."""
