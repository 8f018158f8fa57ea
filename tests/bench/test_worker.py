"""A worker's times include what the device has yet to do when the host is done, as on CUDA."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from services.codec_worker.engines.base import DecodeStep
from services.tokenizer_worker.engines.base import Song
from shared.model.prompt import Prompt
from tests.bench import worker


class Device:
    """A clock: a call takes 1 s of the host, and 10 s of the device, which pass only when it is waited for."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, 0.0

    def launch(self) -> None:
        self.now += 1
        self.asked += 10

    def synchronise(self) -> None:
        self.now, self.asked = self.now + self.asked, 0.0


class Engine:
    """Engine of both kinds that returns before the device has finished."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def admit(self, *_: Any) -> None:
        self._device.launch()

    def step(self) -> dict[str, np.ndarray]:
        self._device.launch()
        return {}

    def song_bytes(self, _: Song) -> int:
        return 1

    def decode(self, *_: Any, seed: int) -> Iterator[DecodeStep]:
        for n in range(5):
            self._device.launch()
            yield DecodeStep(n + 1, 5, None if n < 3 else np.zeros((1, 2), np.float32))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(worker, "synchronise", device.synchronise)
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    return device


def test_times_of_the_language_model_include_the_device(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = worker.LM.__new__(worker.LM)
    lm.engine = Engine(device)  # type: ignore[assignment]
    lm._song, lm._songs = Song(prompt=Prompt((1,), (2,)), max_frames=9), []
    assert lm.prefill(2) == {"ms": 33_000, "song_bytes": 1}  # two prefills and the first frame
    monkeypatch.setattr(worker, "FRAMES", 4)
    assert lm.step() == {"ms": 11_000}
    assert device.asked == 0  # nothing goes on during another side's turn


def test_parts_of_the_codec_include_the_device(device: Device) -> None:
    codec = worker.Codec.__new__(worker.Codec)
    codec.engine, codec._codes = Engine(device), np.zeros((8, 1), np.int16)  # type: ignore[assignment]
    assert codec.decode() == {"ms": 55_000, "estimator_ms": 33_000, "scalar_ms": 22_000}
