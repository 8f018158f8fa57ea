"""A codec engine without a model: every frame becomes a beep of 80 ms. For testing the flow of jobs."""

import time
from collections.abc import Iterator

import numpy as np

from services.codec_worker.engines.base import DecodeStep
from shared.frames import samples_of
from shared.model.sizes import TrivialSizes

FRAMES_A_STEP = 25


class TrivialCodec:
    """Makes beeps whose pitch follows codebook 0 and whose loudness follows codebook 1, at a settable pace."""

    notes: tuple[str, ...] = ()
    sample_rate = 8000
    weight_bytes = TrivialSizes.CODEC
    work_bytes = TrivialSizes.CODEC_WORK

    def __init__(self, step_ms: int) -> None:
        self._pause = step_ms / 1000

    def load(self) -> None:
        """Read nothing: there are no weights."""

    def to_device(self) -> None:
        """Nothing to move."""

    def to_host(self) -> None:
        """Nothing to move."""

    def decode(self, codes: np.ndarray, *, seed: int) -> Iterator[DecodeStep]:
        """Make beeps, two seconds of audio a step."""
        frames = codes.shape[1]
        samples = samples_of(1, self.sample_rate)
        total = -(-frames // FRAMES_A_STEP)
        time_axis = np.arange(samples, dtype=np.float32) / self.sample_rate
        swell = np.sin(np.pi * np.arange(samples) / samples)  # no clicks between beeps
        for step in range(total):
            time.sleep(self._pause)
            part = codes[:, step * FRAMES_A_STEP : (step + 1) * FRAMES_A_STEP]
            pitch, loudness = 220 * 2 ** (part[0] / 24), 0.05 + 0.25 * part[1] / 64  # [frames] Hz, of 1
            waves = np.sin(2 * np.pi * pitch[:, None] * time_axis)  # [frames, samples]
            tone = (loudness[:, None] * swell * waves).reshape(-1, 1)  # [samples, 1]
            yield DecodeStep(step + 1, total, np.repeat(tone, 2, axis=1).astype(np.float32))
