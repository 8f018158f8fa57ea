"""Mel spectra of MuEncoder and of Whisper, in fp32 on the CPU.

Bins near the floor are rounding noise of the FFT, which differs by decibels between devices: computed on the host, a
recording has the same codes wherever the networks run.
"""

import math
from functools import cache

import torch
from torch import Tensor

FLOOR = 1e-10  # of a mel band's power, before the logarithm
MU_SIZE, MU_HOP, MU_RATE = 2048, 240, 24_000  # samples, samples, Hz
MU_MULTIPLE = 960  # samples of a frame at 25 Hz: what is left over of them is dropped
WHISPER_SIZE, WHISPER_HOP, WHISPER_RATE = 400, 160, 16_000
WHISPER_SAMPLES = 480_000  # 30 s, which Whisper always hears
WHISPER_RANGE = 8.0  # below the loudest band, in powers of ten


def mu_decibels(audio: Tensor, bands: int) -> Tensor:
    """Mel spectrum in dB of 24 kHz ``audio [rows, samples]``: ``[rows, frames, bands]``, 100 frames a second."""
    whole = audio[:, : audio.shape[1] // MU_MULTIPLE * MU_MULTIPLE]
    power = power_spectrum(whole, MU_SIZE, MU_HOP)
    return 10 * (power @ htk_filters(bands)).clamp_min(FLOOR).log10()


def whisper_log_mel(audio: Tensor, bands: int) -> Tensor:
    """What Whisper hears of 16 kHz ``audio [rows, samples]``, silence up to 30 s: ``[rows, 3000, bands]``."""
    filled = torch.nn.functional.pad(audio, (0, WHISPER_SAMPLES - audio.shape[1]))
    power = power_spectrum(filled, WHISPER_SIZE, WHISPER_HOP)
    logarithm = (power @ slaney_filters(bands)).clamp_min(FLOOR).log10()
    loudest = logarithm.amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(logarithm, loudest - WHISPER_RANGE) + 4) / 4


def power_spectrum(audio: Tensor, size: int, hop: int) -> Tensor:
    """Power of a short-time Fourier transform, ``[rows, samples // hop, size / 2 + 1]``.

    Frames are centred on multiples of `hop` under a periodic Hann window, with the signal mirrored at its ends. The
    frame at the very end is left out.
    """
    spectrum = torch.stft(
        audio, size, hop, window=torch.hann_window(size), center=True, pad_mode="reflect", return_complex=True
    )
    return spectrum[..., :-1].abs().square().transpose(1, 2)


@cache
def htk_filters(bands: int) -> Tensor:
    """Triangles of height 1 on the scale 2595 · log10(1 + f / 700), up to 12 kHz; fp32 ``[1025, bands]``."""
    top = 2595 * math.log10(1 + MU_RATE / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)
    return triangles(torch.linspace(0, MU_RATE // 2, MU_SIZE // 2 + 1), corners)


@cache
def slaney_filters(bands: int) -> Tensor:
    """Triangles of area 1 on Slaney's scale (Auditory Toolbox, 1998), up to 8 kHz; fp32 ``[201, bands]``.

    The scale is linear up to 1 kHz, 15 mels, and then logarithmic: 27 mels for a factor of 6.4. Made in fp64.
    """
    top = 15 + math.log(WHISPER_RATE / 2 / 1000) * 27 / math.log(6.4)
    mels = torch.linspace(0, top, bands + 2, dtype=torch.float64)
    corners = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * math.log(6.4) / 27))
    frequencies = torch.linspace(0, WHISPER_RATE // 2, WHISPER_SIZE // 2 + 1, dtype=torch.float64)
    return (triangles(frequencies, corners) * (2 / (corners[2:] - corners[:-2]))).float()


def triangles(frequencies: Tensor, corners: Tensor) -> Tensor:
    """Triangular filters with these ``corners [bands + 2]`` at ``frequencies [n]``, both in Hz: ``[n, bands]``."""
    widths = corners.diff()
    rising = (frequencies[:, None] - corners[:-2]) / widths[:-1]
    falling = (corners[2:] - frequencies[:, None]) / widths[1:]
    return torch.minimum(rising, falling).clamp_min(0)
