"""Samples of 16 bits are those that libsndfile makes of fractions when it writes a FLAC file."""

from io import BytesIO

import numpy as np
import pytest
import soundfile

from shared.audio.pcm import pcm16
from shared.errors import SongError


def written_by_libsndfile(audio: np.ndarray) -> np.ndarray:
    """The samples of a 16-bit FLAC file that was written from fractions, clipped before."""
    file = BytesIO()
    soundfile.write(file, np.clip(audio, -1, 1), 48_000, "PCM_16", format="FLAC")
    file.seek(0)
    return np.asarray(soundfile.read(file, dtype="int16", always_2d=True)[0])


def halves() -> np.ndarray:
    """Every boundary between two whole numbers, and its neighbours on both sides."""
    exact = ((np.arange(-32_770, 32_770) + 0.5) / 32_768).astype(np.float32)
    return np.concatenate([exact, *(np.nextafter(exact, np.float32(side)) for side in (-9, 9))])


VALUES = {
    "music": np.random.default_rng(1).normal(0, 0.2, 200_000),
    "too loud": np.random.default_rng(2).normal(0, 2, 200_000),
    "halves": halves(),
    "whole": np.arange(-32_768, 32_769) / 32_768,
    "extreme": np.array([0.0, -0.0, 1e-45, -1e-45, 1, -1, 0.99998, -0.99999, 3.4e38, -3.4e38, 1 + 1e-7, -1 - 1e-7]),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_samples_are_those_of_a_file_that_is_written_from_fractions(values: np.ndarray) -> None:
    audio = np.stack([values, -values], axis=1).astype(np.float32)
    samples = pcm16(audio)
    assert samples.dtype == np.int16
    assert np.array_equal(samples, written_by_libsndfile(audio))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_audio_that_is_not_finite_is_the_songs_fault(bad: float) -> None:
    audio = np.zeros((100, 2), np.float32)
    audio[99, 1] = bad
    with pytest.raises(SongError, match="not finite"):
        pcm16(audio)
