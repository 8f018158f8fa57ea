"""ITU-T G.711: samples of telephony, a byte each, of a sign, three bits of an exponent and four of a mantissa."""

from functools import cache

import numpy as np

_SIGN = 0x80
_ULAW_BIAS, _ULAW_MOST = 33 << 2, 0x7FFF - (33 << 2)  # of 16-bit samples; those of the recommendation have 14
_ALAW_BITS, _ALAW_MASK = 3, 0x55  # bits of a 16-bit sample that are left out; every second bit of a byte is inverted


def ulaw(pcm: np.ndarray) -> np.ndarray:
    """Code int16 samples by the µ-law, as uint8 of the same shape."""
    coded: np.ndarray = _ulaw_table()[pcm.view(np.uint16)]
    return coded


def alaw(pcm: np.ndarray) -> np.ndarray:
    """Code int16 samples by the A-law, as uint8 of the same shape."""
    coded: np.ndarray = _alaw_table()[pcm.view(np.uint16)]
    return coded


def _samples() -> np.ndarray:
    """Every sample, in the order of its bits."""
    return np.arange(2**16, dtype=np.uint16).view(np.int16).astype(np.int32)


def _exponent(magnitude: np.ndarray, bits: int) -> np.ndarray:
    """Number of bits by which a magnitude is longer than `bits`, at least 0."""
    exponent: np.ndarray = np.maximum(np.frexp(magnitude)[1] - bits, 0)
    return exponent


@cache
def _ulaw_table() -> np.ndarray:
    sample = _samples()
    magnitude = np.minimum(np.abs(sample), _ULAW_MOST) + _ULAW_BIAS
    exponent = _exponent(magnitude, 8)
    code = exponent << 4 | magnitude >> exponent + 3 & 0xF
    table: np.ndarray = ~np.where(sample < 0, _SIGN | code, code) & 0xFF
    return table.astype(np.uint8)


@cache
def _alaw_table() -> np.ndarray:
    sample = _samples()
    magnitude = np.where(sample < 0, ~sample, sample) >> _ALAW_BITS
    exponent = _exponent(magnitude, 5)
    code = exponent << 4 | magnitude >> np.maximum(exponent, 1) & 0xF
    table: np.ndarray = np.where(sample < 0, code, _SIGN | code) ^ _ALAW_MASK
    return table.astype(np.uint8)
