"""Noise that is counted rather than drawn from a generator with a state (Salmon et al. 2011).

Every device draws alike, and a song can go on at any frame. The generator is SplitMix64 (Steele, Lea & Flood 2014).
"""

import torch
from torch import Tensor
from torch.library import custom_op

from services.tokenizer_worker.model.kernels.operators import declare_launches

# SplitMix64's increment of its counter, and how it mixes a counter's value.
_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(number: int) -> int:
    """Interpret the lowest 64 bits of a number as a signed 64-bit number."""
    return (number + 2**63) % 2**64 - 2**63


COUNTER_STEP = _signed(_INCREMENT)
"""Difference between a song's counters at two neighbouring frames."""


def counter(seed: int, frame: int) -> int:
    """State of the SplitMix64 generator started at `seed` when it makes output `frame`: a signed 64-bit number.

    A frame's output is the seed of its noise. Neighbouring seeds and frames come out unrelated, and frame n needs no
    frame before it.
    """
    return _signed(seed + (frame + 1) * _INCREMENT)


def mix(counters: Tensor) -> Tensor:
    """The outputs of SplitMix64 for the values of its counter; int64 for unsigned 64-bit numbers, both."""
    z = (counters ^ _shift(counters, 30)).mul_(_signed(_FIRST))
    z.bitwise_xor_(_shift(z, 27)).mul_(_signed(_SECOND))
    return z.bitwise_xor_(_shift(z, 31))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift logically to the right: zeros come in from the left."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def noise_counters(codebooks: int, vocabulary: int) -> Tensor:
    """Counters of each code's noise in a frame's own generator, int64 ``[codebooks, V]``."""
    outputs = torch.arange(1, codebooks * vocabulary + 1, device="cpu")
    return (outputs * COUNTER_STEP).view(codebooks, vocabulary)


def exponential_noise(seeds: Tensor, within: Tensor) -> Tensor:
    """Noise for one frame of each song, Exp(1), fp32, on the device of its arguments.

    `seeds` are the frames', that is the songs' counters mixed, int64 ``[songs]``; `within` is one row of
    `noise_counters` or all of them: the noise is ``[songs, V]`` or ``[codebooks, songs, V]``.
    """
    bits = mix(seeds[:, None] + within[..., None, :])
    # 23 of them, in the middle of their interval: no logarithm of 0, and none that is 0.
    uniform = (bits >> 41).bitwise_and_((1 << 23) - 1).float().add_(0.5).mul_(2**-23)
    return uniform.log_().neg_()


@custom_op("heartmula::noise", mutates_args=(), device_types="cpu")
def noise(counters: Tensor, codebooks: int, vocabulary: int) -> Tensor:
    """Exp(1) noise of a frame of n songs, fp32 ``[codebooks, n, vocabulary]``, from their counters, int64 ``[n]``.

    A counter's output is the seed of a generator of the frame's own, whose outputs go codebook by codebook. On CUDA the
    integers are the same to the bit; the logarithm is CUDA's, which may differ from the CPU's in the last bit, as that
    of PyTorch's CUDA kernels does. It can choose another code only where two candidates are equal up to that bit.
    """
    return exponential_noise(mix(counters), noise_counters(codebooks, vocabulary).to(counters.device))


@noise.register_kernel("cuda")
def _on_cuda(counters: Tensor, codebooks: int, vocabulary: int) -> Tensor:
    from services.tokenizer_worker.model.kernels.triton_kernels import noise as kernels

    return kernels.noise(counters, codebooks, vocabulary)


@noise.register_fake
def _shape(counters: Tensor, codebooks: int, vocabulary: int) -> Tensor:
    return counters.new_empty(codebooks, len(counters), vocabulary, dtype=torch.float32)


declare_launches(noise, lambda *_: 1)
