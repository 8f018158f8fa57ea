"""Analysis of recordings: tempo, genre, instrument and mood of one, and the distance between two.

Nothing here knows codes or latents. The listener is trained on synthesised songs, by linear discriminant analysis
(Fisher 1936) of a few features, and then asked about what the networks made.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ckpt.training.music import GENRES, MOODS, TEMPI, TIMBRES
from shared.frames import milliseconds_of

BLOCK, HOP = 1024, 240  # samples of a spectrum, and from one to the next: 10 ms at 24 kHz
BANDS = 48


def spectra(sound: np.ndarray) -> np.ndarray:
    """Power spectra of mono sound ``[samples]``, ``[T, BLOCK / 2 + 1]``, with a Hann window."""
    padded = np.pad(sound, (BLOCK // 2, BLOCK))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, BLOCK)[::HOP][: len(sound) // HOP]
    return np.asarray(np.abs(np.fft.rfft(pieces * np.hanning(BLOCK), axis=1)) ** 2)


def mel_bands(rate: int, bands: int = BANDS) -> np.ndarray:
    """Triangular filters, evenly spaced in mel (O'Shaughnessy 1987: 2595 · log10(1 + f / 700)), ``[bins, bands]``."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(BLOCK, 1 / rate)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    return np.asarray(np.clip(np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)), 0, None))


def log_mel(sound: np.ndarray, rate: int, floor: float | None = None) -> np.ndarray:
    """Mel spectra in dB, ``[T, bands]``; what lies below `floor` dB, or else 60 dB below the loudest, is not heard."""
    mel = 10 * np.log10(spectra(sound) @ mel_bands(rate) + 1e-12)
    return np.asarray(np.maximum(mel, mel.max() - 60 if floor is None else floor))


def chroma(sound: np.ndarray, rate: int) -> np.ndarray:
    """Strength of each pitch class between 55 Hz and 1 kHz, ``[T, 12]``, in windows of a quarter of a second."""
    size, hop = rate // 4, rate // 25
    padded = np.pad(sound, (size // 2, size))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop][: len(sound) // hop]
    power = np.abs(np.fft.rfft(pieces * np.hanning(size), 4 * size, axis=1))
    hertz = np.fft.rfftfreq(4 * size, 1 / rate)
    used = (hertz > 55) & (hertz < 1000)
    pitch = np.round(12 * np.log2(hertz[used] / 440) + 69).astype(int) % 12
    return np.asarray(power[:, used] @ np.eye(12)[pitch])


@dataclass(frozen=True)
class Distance:
    """Distance of a recording from the expected one."""

    log_mel: float  # dB, mean over time and bands; what lies 60 dB below the loudest does not count
    chroma: float  # correlation, mean over time
    snr: float  # dB

    @classmethod
    def between(cls, sound: np.ndarray, wanted: np.ndarray, rate: int) -> "Distance":
        """Measure the distance between two recordings, stereo audio ``[2, samples]``."""
        noise = ((sound - wanted) ** 2).sum()
        left, right = sound.mean(0), wanted.mean(0)
        wanted_mel = log_mel(right, rate)
        mel = np.abs(log_mel(left, rate, wanted_mel.max() - 60) - wanted_mel).mean()
        a, b = chroma(left, rate), chroma(right, rate)
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        heard = np.linalg.norm(b, axis=1) > 1e-3 * np.linalg.norm(b, axis=1).max()
        similar = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-9)
        return cls(float(mel), float(similar[heard].mean()), float(10 * np.log10((wanted**2).sum() / noise)))


def strokes(sound: np.ndarray, rate: int) -> np.ndarray:
    """Onsets: rise of the level in three bands (to 150 Hz, 2.5 kHz, above), ``[T, 3]``, every 10 ms."""
    hertz = np.fft.rfftfreq(BLOCK, 1 / rate)
    bands = np.stack((hertz < 150, (hertz >= 150) & (hertz < 2500), hertz >= 2500), 1)
    level = np.sqrt(spectra(sound) @ bands)
    rise = np.diff(level, axis=0, prepend=0).clip(min=0)
    return np.asarray(rise / (rise.std(0) + 1e-6))


def tempo(sound: np.ndarray, rate: int) -> str:
    """Which of `TEMPI` the strokes of mono sound repeat at: the one whose beats, and pairs of beats, are most alike."""
    rise = strokes(sound, rate)
    rise = rise - rise.mean(0)
    spectrum = np.abs(np.fft.rfft(rise, 2 * len(rise), axis=0)) ** 2
    alike = np.fft.irfft(spectrum, axis=0).sum(1)

    def strength(frames: int) -> float:
        beat = milliseconds_of(frames) // 10  # in units of 10 ms
        lags = [round(beat * beats) for beats in (0.5, 1, 2, 3, 4)]
        return float(sum(alike[lag - 1 : lag + 2].max() for lag in lags if lag + 2 < len(rise)))

    return max(TEMPI, key=lambda name: strength(TEMPI[name]))


def features(sound: np.ndarray, rate: int) -> np.ndarray:
    """Numbers that tell songs apart: what is struck where in a bar, the spectrum and its changes, harmony. Of mono
    sound that begins with the song, ``[features]``."""
    rise, beat = strokes(sound, rate), milliseconds_of(TEMPI[tempo(sound, rate)]) // 10
    place = (np.arange(len(rise)) / (beat / 4)).round().astype(int)  # sixteenths
    bars = [rise[place % steps == at].mean(0) for steps in (16, 12) for at in range(steps)]

    mel = log_mel(sound, rate)
    mel = (mel - mel.max())[:, :36]
    cepstrum = mel @ np.cos(np.pi / 36 * np.outer(np.arange(36) + 0.5, np.arange(16)))
    change = np.diff(mel, axis=0)
    steep = np.percentile(change, (5, 25, 75, 95), axis=1).mean(1)

    mean = chroma(sound, rate).mean(0)
    mean = (mean - mean.mean()) / mean.std()
    fits = []
    for minor in (0, 1):
        scale = np.zeros(12)
        scale[[0, 4 - minor, 7]] = (3, 2, 2)
        scale[[2, 5, 9 - minor, 11]] += 1
        fits.append([float(np.roll(mean, -tonic) @ (scale - scale.mean())) for tonic in range(12)])
    tonic = int(np.argmax(fits)) % 12
    major, minor = np.max(fits, axis=1)
    harmony = [*np.roll(mean, -tonic), major, minor, major - minor]
    return np.concatenate((np.ravel(bars), cepstrum.mean(0), cepstrum.std(0), steep, change.std(0), harmony))


class Discriminant:
    """Linear discriminant analysis with a little ridge: the class whose mean is nearest in units of the spread within
    classes (Fisher 1936)."""

    def __init__(self, x: np.ndarray, classes: np.ndarray) -> None:
        """Examples ``[n, features]`` and the class of each, counted from 0."""
        self._middle, self._scale = x.mean(0), x.std(0) + 1e-6
        x = self._scaled(x)
        means = np.stack([x[classes == number].mean(0) for number in range(classes.max() + 1)])
        within = x - means[classes]
        self._weights = np.linalg.solve(within.T @ within / len(x) + 0.1 * np.eye(x.shape[1]), means.T)
        self._bias = -0.5 * (means.T * self._weights).sum(0)

    def __call__(self, x: np.ndarray) -> int:
        """Class of ``x [features]``."""
        return int((self._scaled(x) @ self._weights + self._bias).argmax())

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        return np.asarray((x - self._middle) / self._scale)


class Listener:
    """Names the tags that it hears, once it has heard examples."""

    def __init__(self, sounds: Iterable[np.ndarray], named: Sequence[dict[str, str]], rate: int) -> None:
        """Stereo sounds ``[2, samples]``, and the tags that each was made for."""
        self._rate = rate
        heard = np.stack([features(sound.mean(0), rate) for sound in sounds])
        kinds = {"genre": tuple(GENRES), "instrument": TIMBRES, "mood": MOODS}
        self._rules = {
            kind: (Discriminant(heard, np.array([names.index(tags[kind]) for tags in named])), names)
            for kind, names in kinds.items()
        }

    def hear(self, sound: np.ndarray) -> dict[str, str]:
        """The four tags of stereo sound ``[2, samples]``."""
        mono = sound.mean(0)
        heard = features(mono, self._rate)
        found = {kind: names[rule(heard)] for kind, (rule, names) in self._rules.items()}
        return {**found, "tempo": tempo(mono, self._rate)}


def harmony(sound: np.ndarray, rate: int) -> np.ndarray:
    """Numbers that tell keys apart: how strong each pitch class is on the whole, of mono sound, ``[12]``."""
    mean = np.log(chroma(sound, rate).mean(0) + 1e-6)
    return np.asarray((mean - mean.mean()) / (mean.std() + 1e-6))
