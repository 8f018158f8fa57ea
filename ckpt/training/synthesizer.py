"""Synthesiser of codes: a bank of wheels that turn all the time, as in a tonewheel organ, and a drum machine.

There is a wheel for every semitone. A tone opens some of them, for its fundamental and its overtones, as far as timbre
and age have it; so overtones are tempered, and phases follow from the clock alone. Every wheel is back where it began
after `CLOCK` frames. That makes latents a function of what sounds now, and the waveform a linear function of latents:
`KERNELS`, one an entry, overlapped and added. The scalar decoder is these kernels; the estimator learns the latents.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ckpt.training import codes
from ckpt.training.music import TIMBRES

SAMPLE_RATE = 24_000
HOP = 960  # samples a latent, of which there are 25 a second
CHANNELS = 128  # of a latent, for each of left and right
LOUDNESS = 0.7  # so that no song clips
SCALE = 4000.0  # of latents above gains: flow matching starts from noise of 1, which is then hardly heard

LOW = range(36, 79)  # MIDI; these wheels take two channels of a latent, for cosine and sine
HIGH = range(79, 111)  # multiples of 12.5 Hz, whose phase is 0 or half a turn at every latent: one channel suffices
WHEELS = range(LOW.start, HIGH.stop)
DRUMS = 2 * len(LOW) + len(HIGH)  # the first channel of a drum: four of the kick, four of the snare, two hats


def _turns() -> np.ndarray:
    """How far each wheel turns in a latent, in units of 1 / (2 · CLOCK) of a whole turn."""
    hertz = 440 * 2 ** ((np.array(WHEELS) - 69) / 12)
    grid = np.where(np.array(WHEELS) < HIGH.start, 12.5 / codes.CLOCK, 12.5)
    return np.round(np.round(hertz / grid) * grid * 2 * codes.CLOCK / 25).astype(int)


TURNS = _turns()  # [wheels]


@dataclass(frozen=True)
class Timbre:
    """A timbre: how the overtones of a tone begin and fade."""

    overtones: dict[int, float]  # semitones above the fundamental → amplitude
    attack: tuple[float, ...]  # amplitude of the first latents
    decay: float  # seconds; overtones fade faster, the more so the higher they are
    sustain: float  # what is left in the end

    def gains(self, note: int, age: float) -> np.ndarray:
        """Levels of the wheels for a tone (MIDI) that began `age` latents ago, ``[wheels]``."""
        found = np.zeros(len(WHEELS))
        attack = self.attack[int(age)] if age < len(self.attack) else 1.0
        for above, amplitude in self.overtones.items():
            if note + above in WHEELS:
                faded = np.exp(-age / 25 / self.decay * (1 + above / 12))
                found[note + above - WHEELS.start] += amplitude * attack * (self.sustain + (1 - self.sustain) * faded)
        return found


PIANO = Timbre({0: 1, 12: 0.45, 19: 0.25, 24: 0.16, 28: 0.08, 31: 0.06}, (1.0,), 0.8, 0.15)
GUITAR = Timbre({0: 0.8, 12: 0.7, 19: 0.55, 24: 0.35, 28: 0.25, 31: 0.2, 36: 0.12}, (1.0,), 0.3, 0.05)
STRINGS = Timbre({0: 0.9, 12: 0.55, 19: 0.42, 24: 0.3, 28: 0.2, 31: 0.15, 36: 0.1}, (0.1, 0.3, 0.5, 0.7, 0.85), 9, 0.9)
ORGAN = Timbre({0: 0.8, 12: 0.7, 24: 0.5, 36: 0.25}, (0.5,), 9, 1.0)
FLUTE = Timbre({0: 1.15, 12: 0.12}, (0.25, 0.7, 0.9), 9, 0.9)
SYNTHESIZER = Timbre({0: 0.7, 12: 0.5, 19: 0.7, 24: 0.4, 28: 0.5, 31: 0.4, 34: 0.3, 36: 0.3}, (0.8,), 1.2, 0.5)
_TIMBRES = (PIANO, GUITAR, STRINGS, ORGAN, FLUTE, SYNTHESIZER)
_BASS = Timbre({0: 1, 12: 0.5, 19: 0.2, 24: 0.1}, (1.0,), 0.8, 0.4)
assert len(_TIMBRES) == len(TIMBRES)

_LEVELS = {"melody": 0.15, "chord": 0.065, "bass": 0.17}
_DRUM_LEVELS = np.array([0.5] * 4 + [0.28] * 4 + [0.13] * 2)


def _pan() -> np.ndarray:
    """Loudness of each channel of a latent on the left and on the right, ``[2, 128]``: wheels stand side by side."""
    wheel = 0.4 * np.sin(np.arange(len(WHEELS)) * 2 * np.pi / 5) * np.clip(np.arange(len(WHEELS)) / 20 - 0.3, 0, 1)
    low = len(LOW)
    drums = np.array([0.0] * 4 + [0.1] * 4 + [-0.3] * 2)
    side = np.concatenate((wheel[:low], wheel[:low], wheel[low:], drums))
    return np.asarray(np.sqrt(np.stack((1 + side, 1 - side))))


PAN = _pan()


def _blocks(root: int, minor: int, state: int) -> list[tuple[int, float, float]]:
    """Notes of a chord, their loudness, and their age in latents at the frame's first half."""
    triad = [55 + (root + above - 55) % 12 for above in (0, 4 - minor, 7)]
    if state == 0:
        return []
    if state <= 2 * codes.BLOCK_AGES:
        full, age = divmod(state - 1, codes.BLOCK_AGES)
        notes = [(note, 1.0) for note in triad] + [(note + 12, 0.7) for note in triad if full]
        return [(note, level, (0, 2, 4, 8)[age]) for note, level in notes]
    tone, ringing = divmod(state - 1 - 2 * codes.BLOCK_AGES, 2)
    return [(sorted(triad)[tone], 1.8, 2.0 * ringing)]


def _table(stream: str) -> np.ndarray:
    """Gains of the wheels for each code of a stream, ``[codes, timbres, 2 (halves of a frame), wheels]``."""
    sizes = codes.STREAMS[stream]
    table = np.zeros((int(np.prod(sizes)), len(TIMBRES), 2, len(WHEELS)), np.float32)
    for code in range(len(table)):
        tones: list[tuple[int, float, float]] = []
        if stream == "chord":
            root, minor, state = (int(field) for field in np.unravel_index(code, sizes))
            tones = _blocks(root, minor, state)
        elif code < sizes[0] - 1:
            ages, notes = (codes.MELODY_AGES, codes.MELODY) if stream == "melody" else (codes.BASS_AGES, codes.BASS)
            tones = [(notes[code // ages], 1.0, 2 * (code % ages))]
        for note, level, age in tones:
            for number, timbre in enumerate(_TIMBRES):
                for half in range(2):
                    played = _BASS if stream == "bass" else timbre
                    table[code, number, half] += level * played.gains(note, age + half)
    return table


TABLES = {stream: _table(stream) for stream in _LEVELS}


def latents(song: np.ndarray) -> Tensor:
    """Latents that the estimator should make of codes, int ``[8, T]`` → fp32 ``[2T, 256]``: left, then right."""
    fields = codes.unpack(song)
    rows = dict(zip(codes.STREAMS, song, strict=True))
    clock, timbre = fields["wheels"].T
    parts = [level * TABLES[stream][rows[stream], timbre] for stream, level in _LEVELS.items()]
    gains = np.sum(parts, axis=0).reshape(-1, len(WHEELS))  # [2T, wheels]
    latent = (2 * clock[:, None] + np.arange(2)).reshape(-1, 1)
    phase = 2 * np.pi / (2 * codes.CLOCK) * (latent * TURNS % (2 * codes.CLOCK))  # [2T, wheels]
    low = len(LOW)
    cosine, sine = np.cos(phase) * gains, np.sin(phase[:, :low]) * gains[:, :low]
    struck = np.zeros((song.shape[1], 2, CHANNELS - DRUMS), np.float32)
    first = 0
    for drum, ages in enumerate(codes.DRUM_AGES):
        for age in range(1, ages):
            for half in range(2):
                struck[:, half, first] = fields["drums"][:, drum] == age
                first += 1
    drums = struck.reshape(-1, CHANNELS - DRUMS) * _DRUM_LEVELS
    mono = np.concatenate((cosine[:, :low], sine, cosine[:, low:], drums), axis=1)  # [2T, 128]
    return torch.from_numpy((SCALE * mono[:, None] * PAN).reshape(len(mono), -1).astype(np.float32))


def _kernels() -> Tensor:
    """Waveform of a 1 in each channel of a latent, fp32 ``[128, 2 · HOP]``."""
    rng = np.random.default_rng(7)
    time = np.arange(2 * HOP) / SAMPLE_RATE
    rise = 1 - np.abs(np.arange(2 * HOP) / HOP - 1)  # neighbours cross-fade linearly
    angle = 2 * np.pi * (np.outer(TURNS, time) * 25 / (2 * codes.CLOCK) + rng.random((len(WHEELS), 1)))
    low = len(LOW)
    wheels = np.concatenate((np.cos(angle[:low]), -np.sin(angle[:low]), np.cos(angle[low:]))) * rise
    t = np.arange(4 * HOP) / SAMPLE_RATE
    noise = np.diff(rng.standard_normal(len(t) + 1)) / 2  # brighter than white
    end = np.clip((len(t) - np.arange(len(t))) / 240, 0, 1)
    kick = np.sin(2 * np.pi * (48 * t + 4.2 * (1 - np.exp(-t / 0.03)))) * np.exp(-t / 0.07) * end
    snare = (0.7 * noise * np.exp(-t / 0.06) + 0.6 * np.sin(2 * np.pi * 190 * t) * np.exp(-t / 0.04)) * end
    hat = np.diff(noise, append=0)[: 2 * HOP] * np.exp(-t[: 2 * HOP] / 0.02) * end[2 * HOP :]
    drums = np.zeros((CHANNELS - DRUMS, 2 * HOP))
    drums[:, :HOP] = np.concatenate((kick, snare, hat)).reshape(-1, HOP)
    return torch.from_numpy(np.concatenate((wheels, drums)) * LOUDNESS / SCALE).float()


KERNELS = _kernels()


def waveform(latent: Tensor) -> Tensor:
    """Waveform of latents, fp32 ``[2T, 256]`` → ``[2, 2T · HOP]``."""
    pieces = latent.view(len(latent), 2, CHANNELS).transpose(0, 1) @ KERNELS  # [2, T, 2 · HOP]
    pieces[:, 1:, :HOP] += pieces[:, :-1, HOP:]
    return pieces[..., :HOP].flatten(1)
