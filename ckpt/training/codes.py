"""The eight codes of a frame: a score on the grid of 80 ms, and where in it the song is.

A frame says all that the next one depends on, besides the lyrics and, after a rest, the tone before it. Of the eight
streams the first three and the keys are the language model's own memory; the others are what sounds.
"""

import numpy as np

from ckpt.training.music import ENTRIES, GENRES, KEYS, PHRASES, SECTIONS, TEMPI, TIMBRES

CLOCK = 32  # frames after which every wheel of the synthesiser is where it was
MELODY = range(57, 79)  # MIDI
BASS = range(36, 60)
MELODY_AGES, BASS_AGES = 12, 8  # frames since a tone began; the last is all that is older
BLOCK_AGES = 4  # 0, 1, 2–3, 4 and more
CHORD_STATES = 1 + 2 * BLOCK_AGES + 3 * 2  # silent; thin; full; one of three tones, just struck or ringing
DRUM_AGES = (3, 3, 2)  # kick, snare, hat: silent, or how many frames since it was struck

_BARS = [(tempo, beats) for tempo in range(len(TEMPI)) for beats in (3, 4)]
_LENGTHS = [list(TEMPI.values())[tempo] * beats for tempo, beats in _BARS]
_STARTS = np.cumsum([0, *_LENGTHS])

STREAMS: dict[str, tuple[int, ...]] = {
    "place": (ENTRIES + 1, len(SECTIONS)),
    "phrase": (len(PHRASES), len(GENRES)),
    "beat": (int(_STARTS[-1]),),  # which tempo and metre, and which frame of the bar
    "wheels": (CLOCK, len(TIMBRES)),
    "chord": (12, 2, CHORD_STATES),  # root, minor?, how it is played
    "bass": (len(BASS) * BASS_AGES + 1,),  # the last: silence
    "drums": (*DRUM_AGES, len(KEYS)),
    "melody": (len(MELODY) * MELODY_AGES + 1,),
}
"""The fields of each stream, in the order of the codebooks, and how many values each takes."""

CODES = max(int(np.prod(sizes)) for sizes in STREAMS.values())
SILENT_BASS, SILENT_MELODY = STREAMS["bass"][0] - 1, STREAMS["melody"][0] - 1


def says(stream: str) -> np.ndarray:
    """What each code of a stream says, field by field, as 0 or 1: fp32 ``[codes, fields]``."""
    code = np.arange(int(np.prod(STREAMS[stream])))
    found = [*np.unravel_index(code, STREAMS[stream])]
    if stream == "beat":
        tempo, beats, frame = bar_of(code)
        found = [2 * tempo + beats - 3, frame]
    elif stream == "chord":  # not every root is as likely to be minor
        found = [2 * found[0] + found[1], found[2]]
    elif stream in ("melody", "bass"):
        ages = MELODY_AGES if stream == "melody" else BASS_AGES
        found = [code // ages, np.where(code < code[-1], code % ages, ages)]
    return np.concatenate([np.eye(field.max() + 1, dtype=np.float32)[field] for field in found], axis=1)


def beat(tempo: int, beats: int, frame: int) -> int:
    """Value of the field "beat" for a frame of a bar."""
    return int(_STARTS[_BARS.index((tempo, beats))]) + frame


def bar_of(field: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inverse of `beat`, elementwise: tempo, beats a bar, frame."""
    which = np.searchsorted(_STARTS, field, side="right") - 1
    return np.array(_BARS)[which, 0], np.array(_BARS)[which, 1], field - _STARTS[which]


def pack(fields: dict[str, np.ndarray]) -> np.ndarray:
    """Pack the fields of every stream, ``[T]`` or ``[T, fields]``, into int16 codes ``[8, T]``."""
    rows = [np.ravel_multi_index(np.atleast_2d(fields[name].T), sizes) for name, sizes in STREAMS.items()]
    return np.stack(rows).astype(np.int16)


def unpack(codes: np.ndarray) -> dict[str, np.ndarray]:
    """Unpack codes, int ``[8, T]``, into the fields of every stream, ``[T, fields]``."""
    return {
        name: np.stack(np.unravel_index(np.minimum(row, np.prod(sizes) - 1), sizes), axis=-1)
        for row, (name, sizes) in zip(codes, STREAMS.items(), strict=True)
    }
