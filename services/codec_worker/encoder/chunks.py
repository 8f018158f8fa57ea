"""A recording's chunks and frames, as they follow from its length alone."""

from shared.model.encoder_config import CHUNK

RATE = 24_000  # Hz, at which a recording is cut into chunks
FRAMES = 372  # of a chunk
_PER_SECOND = 12.5  # frames
_FRAME = 1920  # samples


def samples_of(samples: int, sample_rate: int) -> int:
    """Samples at 24 kHz of so many at `sample_rate` Hz, rounded up."""
    return -(-samples * RATE // sample_rate)


def chunk_count(samples: int) -> int:
    """Chunks of so many samples at 24 kHz."""
    return -(-samples // CHUNK)


def frame_count(samples: int) -> int:
    """Frames of so many samples at 24 kHz, as the reference counts them.

    Mostly the last one holds padding, even after whole frames; where the product in float64 falls just short of a
    whole number, and at the end of a whole chunk, it does not.
    """
    return min(int(samples / RATE * _PER_SECOND) + 1, FRAMES * chunk_count(samples))


def whole_frames(samples: int) -> int:
    """Frames of so many samples at 24 kHz without padding in them."""
    return samples // _FRAME
