"""Samples alone, without a header or tags: what reads them has to know their rate, channels and coding."""

from collections.abc import Callable

import numpy as np


class RawEncoder:
    """An `Encoder`; `header` is empty."""

    header = b""

    def __init__(self, code: Callable[[np.ndarray], np.ndarray]) -> None:
        """`code` makes what is written from int16 ``[samples, channels]``, each value by itself."""
        self._code = code

    def encode(self, pcm: np.ndarray) -> bytes:
        """As `Encoder.encode`."""
        return self._code(pcm).tobytes()

    def finish(self) -> tuple[bytes, bytes]:
        """As `Encoder.finish`."""
        return b"", b""

    def close(self) -> None:
        """As `Encoder.close`: there is nothing to let go of."""
