"""A recording in chunks of 29.76 s: how many frames it has, and the signals that each network hears of a chunk."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from services.codec_worker.encoder.chunks import FRAMES, RATE, chunk_count, frame_count, whole_frames
from services.codec_worker.encoder.mel import mu_decibels, whisper_log_mel
from services.codec_worker.encoder.resampling import Resampler
from shared.model.encoder_config import CHUNK, EncoderConfig

PADDING = 240  # samples after a chunk, so that WavLM has its last frame


@dataclass(frozen=True)
class Signals:
    """What the networks hear of some channels, fp32 on the CPU."""

    mel: Tensor  # [channels, 2976, bands], normalised, for MuEncoder
    audio: Tensor  # [channels, 476320] at 16 kHz, for WavLM
    whisper_mel: Tensor  # [channels, 3000, bands]


class Recording:
    """Audio float32 ``[1 or 2, samples]`` with its rate in Hz. It is read chunk by chunk, so a file may be mapped."""

    def __init__(self, audio: np.ndarray, sample_rate: int) -> None:
        if audio.ndim != 2 or audio.shape[0] not in (1, 2) or not audio.shape[1] or audio.dtype != np.float32:
            raise ValueError(f"audio is {audio.dtype} {list(audio.shape)}, expected float32 [1 or 2, samples]")
        self._audio, self._resampler = audio, Resampler(sample_rate, RATE)
        self.samples = self._resampler.length(audio.shape[1])  # at 24 kHz
        self.chunks = chunk_count(self.samples)
        self.frames = frame_count(self.samples)
        self.whole_frames = whole_frames(self.samples)

    def frames_of(self, chunk: int) -> int:
        """Number of frames of a chunk: 372 but in the last."""
        return min(FRAMES, self.frames - chunk * FRAMES)

    def chunk(self, index: int) -> Tensor:
        """A chunk at 24 kHz with its padding, fp32 ``[channels, 714480]``. Two equal channels come as one."""
        start = index * CHUNK
        stop = min(start + CHUNK, self.samples)
        low, high = self._resampler.reach(start, stop)
        heard = self._audio[:, max(0, low) : high]
        mono = np.array_equal(heard[0], heard[-1])
        audio = self._resampler(self._audio[:1] if mono else self._audio, start, stop)
        return F.pad(audio, (0, CHUNK + PADDING - (stop - start)))


def signals(audio: Tensor, config: EncoderConfig) -> Signals:
    """The signals of a ``chunk [channels, 714480]`` at 24 kHz."""
    lower = _TO_16K(audio)
    mel = (mu_decibels(audio, config.mu.n_mels) - config.mu.mean) / config.mu.std
    return Signals(mel, lower, whisper_log_mel(lower, config.whisper.num_mel_bins))


_TO_16K = Resampler(RATE, 16_000, torch.float64)
