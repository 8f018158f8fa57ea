"""Lengths of music in frames of 80 ms, milliseconds and samples, computed in whole numbers alone.

In floating point a song of 201 frames at 48 kHz would come out one sample short.
"""

FRAME_MS = 80


def frames_within(milliseconds: int) -> int:
    """How many whole frames fit into so many milliseconds."""
    return milliseconds // FRAME_MS


def frames_covering(milliseconds: int) -> int:
    """How many frames it takes to last so many milliseconds, or longer."""
    return -(-milliseconds // FRAME_MS)


def frames_nearest(seconds: float) -> int:
    """How many frames come nearest to so many seconds."""
    return round(seconds * 1000 / FRAME_MS)


def milliseconds_of(frames: int) -> int:
    """How many milliseconds so many frames last."""
    return frames * FRAME_MS


def samples_of(frames: int, rate: int) -> int:
    """How many samples per channel so many frames have at `rate` Hz, rounded down."""
    return milliseconds_of(frames) * rate // 1000


def seconds_of(samples: int, rate: int) -> float:
    """How many seconds so many samples at `rate` Hz last, to the nearest millisecond."""
    return (2000 * samples + rate) // (2 * rate) / 1000
