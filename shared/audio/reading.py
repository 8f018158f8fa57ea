"""Reading audio files, without seeking and a second at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from shared.errors import ObjectError


class SequentialFile(soundfile.SoundFile):  # type: ignore[misc]  # which has no types
    """A file that is read without seeking: `SoundFile` seeks after every block, which garbles MP3."""

    def seekable(self) -> bool:
        return False


def read_audio(source: Path | BinaryIO) -> Iterator[np.ndarray]:
    """A file's audio, a second at a time: int16 ``[samples, channels]`` of a 16-bit file, else float32.

    Raises `ObjectError` for a file that is damaged.
    """
    try:
        with SequentialFile(source) as file:
            dtype = "int16" if file.subtype == "PCM_16" else "float32"
            while len(block := file.read(file.samplerate, dtype, always_2d=True)):
                yield block
    except soundfile.LibsndfileError as error:
        raise ObjectError(f"the audio cannot be read: {error}") from None


def sample_rate_of(path: Path) -> int:
    """A file's sample rate in Hz. Raises as `read_audio`."""
    try:
        return int(soundfile.info(path).samplerate)
    except soundfile.LibsndfileError as error:
        raise ObjectError(f"the audio cannot be read: {error}") from None
