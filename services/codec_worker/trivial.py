"""A codec engine without a model: every frame becomes 80 ms of a tone. For testing the flow of jobs."""

import time
from collections.abc import Iterator

import numpy as np

from services.codec_worker.engine import DecodeStep

FRAMES_A_STEP = 25


class TrivialCodec:
    """Sine tones whose pitch follows codebook 0, at a settable pace."""

    sample_rate = 8000
    weight_bytes = 30 * 2**20
    work_bytes = 2**20

    def __init__(self, step_ms: int) -> None:
        self._pause = step_ms / 1000

    def load(self) -> None:
        """Nothing to read."""

    def to_device(self) -> None:
        """Nothing to move."""

    def to_host(self) -> None:
        """Nothing to move."""

    def decode(self, codes: np.ndarray, *, seed: int) -> Iterator[DecodeStep]:
        """Two seconds a step."""
        frames = codes.shape[1]
        samples = self.sample_rate * 2 // 25  # of a frame
        total = -(-frames // FRAMES_A_STEP)
        time_axis = np.arange(samples, dtype=np.float32) / self.sample_rate
        for step in range(total):
            time.sleep(self._pause)
            pitch = 220 * 2 ** (codes[0, step * FRAMES_A_STEP : (step + 1) * FRAMES_A_STEP] / 24)  # [frames] Hz
            tone = 0.2 * np.sin(2 * np.pi * pitch[:, None] * time_axis).reshape(-1, 1)  # [samples, 1]
            yield DecodeStep(step + 1, total, np.repeat(tone, 2, axis=1).astype(np.float32))
