"""Lengths of music: a frame is 80 ms, and what follows from that is computed in whole numbers alone.

In floating point a song of 201 frames at 48 kHz would come out one sample short.
"""

FRAME_MS = 80


def frames_within(milliseconds: int) -> int:
    """How many frames fit into a time."""
    return milliseconds // FRAME_MS


def frames_nearest(seconds: float) -> int:
    """How many frames come nearest to a time that a person has set."""
    return round(seconds * 1000 / FRAME_MS)


def milliseconds_of(frames: int) -> int:
    """How long so many frames last."""
    return frames * FRAME_MS


def samples_of(frames: int, rate: int) -> int:
    """How many samples a channel so many frames have at `rate` Hz; a part of a sample does not count."""
    return milliseconds_of(frames) * rate // 1000


def seconds_of(samples: int, rate: int) -> float:
    """How long so many samples at `rate` Hz last, to the nearest millisecond."""
    return (2000 * samples + rate) // (2 * rate) / 1000
