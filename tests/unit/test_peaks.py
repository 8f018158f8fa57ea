"""Peaks follow the format of audiowaveform, for audio in blocks of any size, and are few."""

import json

import numpy as np
import pytest

from shared.audio.peaks import FINEST, MOST, Peaks, peaks_of
from shared.errors import ObjectError


def noise(samples: int) -> np.ndarray:
    random = np.random.default_rng(1)
    loudness = np.linspace(0.1, 0.9, samples)[:, None]
    return (loudness * random.uniform(-1, 1, (samples, 2))).astype(np.float32)


def expected(audio: np.ndarray, per_point: int) -> list[int]:
    mono = audio.mean(axis=1)
    points = [mono[start : start + per_point] for start in range(0, len(mono), per_point)]
    return [round(float(value) * 127) for point in points for value in (point.min(), point.max())]


@pytest.mark.parametrize(
    "samples", [0, 1, FINEST, FINEST + 1, FINEST * MOST - 1, FINEST * MOST, FINEST * MOST + 700, FINEST * MOST * 3 + 7]
)
def test_every_point_is_the_lowest_and_the_highest_of_its_samples(samples: int) -> None:
    audio = noise(samples)
    blocks = {pieces: peaks_of(np.array_split(audio, pieces), 48_000) for pieces in (1, 7, 100)}
    assert len(set(blocks.values())) == 1
    found = json.loads(blocks[1])
    assert found["length"] <= MOST
    assert found["length"] >= MOST / 2 or found["samples_per_pixel"] == FINEST
    assert found["data"] == expected(audio, found["samples_per_pixel"])
    assert len(found["data"]) == 2 * found["length"]
    del found["data"], found["length"], found["samples_per_pixel"]
    assert found == {"version": 2, "channels": 1, "sample_rate": 48_000, "bits": 8}


def test_louder_than_full_scale_is_clipped_as_the_audio_is() -> None:
    found = json.loads(peaks_of([4 * noise(1000)], 8000))
    assert (min(found["data"]), max(found["data"])) == (-127, 127)


def test_whole_numbers_look_like_fractions() -> None:
    audio = noise(5000)
    (one, two) = (
        json.loads(peaks_of([each], 8000))["data"] for each in (audio, (audio * 32768).round().astype(np.int16))
    )
    assert np.abs(np.subtract(one, two)).max() <= 1


@pytest.mark.parametrize("samples", [FINEST + 1, FINEST * MOST - 1, FINEST * MOST * 2 + 7])
@pytest.mark.parametrize("share", [0, 0.3, 0.77, 1])
def test_peaks_that_were_saved_go_on_as_if_nothing_had_been(samples: int, share: float) -> None:
    audio, cut = (noise(samples) * 32767).astype(np.int16), round(share * samples)
    before = Peaks(48_000)
    before.add(audio[:cut])
    packed = before.pack()
    before.add(audio[cut:])  # changes nothing that was packed
    after = Peaks.unpack(packed)
    after.add(audio[cut:])
    assert after.json() == before.json() == peaks_of([audio], 48_000)


def packed() -> dict[str, np.ndarray]:
    peaks = Peaks(48_000)
    peaks.add(noise(5000))
    return peaks.pack()


@pytest.mark.parametrize("name", packed())
def test_saved_peaks_that_are_damaged_are_an_error(name: str) -> None:
    whole = packed()
    for damage in ({}, {name: np.zeros((MOST + 1, 3), np.float32)}):
        damaged = {key: value for key, value in whole.items() if key != name} | damage
        with pytest.raises(ObjectError, match="peaks cannot be read"):
            Peaks.unpack(damaged)
