"""A codec engine without a model: every frame becomes a beep of 80 ms. For testing the flow of jobs."""

import time

import numpy as np

from services.codec_worker.engines.base import DecodeState, DecodeStep, DecodeSteps
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

    def decode(self, codes: np.ndarray, *, seed: int) -> DecodeSteps:
        """Make beeps, two seconds of audio a step."""
        return self.advance(DecodeState(seed=seed), codes, ended=True)

    def advance(self, state: DecodeState, codes: np.ndarray, *, ended: bool) -> DecodeSteps:
        """Make beeps, two seconds of audio a step: a window. Before the song's end, whole steps only."""
        frames = codes.shape[1]
        stop = -(-frames // FRAMES_A_STEP) if ended else frames // FRAMES_A_STEP
        for window in range(state.window, stop):
            time.sleep(self._pause)
            part = codes[:, window * FRAMES_A_STEP : (window + 1) * FRAMES_A_STEP]
            samples = samples_of(window * FRAMES_A_STEP + part.shape[1], self.sample_rate)
            after = DecodeState(seed=state.seed, window=window + 1, samples=samples)
            yield DecodeStep(window + 1 - state.window, stop - state.window, self._beeps(part), after)

    def _beeps(self, codes: np.ndarray) -> np.ndarray:
        """Beeps of int16 ``[8, T]`` codes, float32 ``[samples, 2]``."""
        samples = samples_of(1, self.sample_rate)
        time_axis = np.arange(samples, dtype=np.float32) / self.sample_rate
        swell = np.sin(np.pi * np.arange(samples) / samples)  # no clicks between beeps
        pitch, loudness = 220 * 2 ** (codes[0] / 24), 0.05 + 0.25 * codes[1] / 64  # [frames] Hz, of 1
        waves = np.sin(2 * np.pi * pitch[:, None] * time_axis)  # [frames, samples]
        tone = (loudness[:, None] * swell * waves).reshape(-1, 1)  # [samples, 1]
        return np.repeat(tone, 2, axis=1).astype(np.float32)
