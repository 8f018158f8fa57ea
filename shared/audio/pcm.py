"""Samples of 16 bits: what every audio file is made from, so that all formats of a song hold the same music."""

import numpy as np

from shared.errors import SongError

FULL_SCALE = 32768


def pcm16(audio: np.ndarray) -> np.ndarray:
    """Return float32 ``[samples, channels]`` (full scale is 1) as int16, as libsndfile rounds it for a FLAC file.

    Rounded to the nearest whole number, halves to the even one. Louder than full scale is clipped: it is heard less
    than another level would be, and the level of a song cannot be known while it is still being decoded. Raises
    `SongError` for audio that is not finite.
    """
    if not np.isfinite(audio).all():
        raise SongError("the codec produced audio that is not finite; try another seed, or HEARTMULA_MODEL_DTYPE")
    scaled: np.ndarray = np.clip(audio, -1, 1) * np.float32(FULL_SCALE)
    return scaled.round().clip(max=FULL_SCALE - 1).astype(np.int16)
