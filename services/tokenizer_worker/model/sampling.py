"""Guidance and sampling of one code. The randomness comes from outside, so that a song can be repeated or resumed."""

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampler:
    """How a song's codes are drawn."""

    temperature: float  # 0 is greedy
    topk: int
    cfg_scale: float

    def guide(self, logits: Tensor) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022): rows c, u of ``[2, V]`` → ``u + (c − u) · cfg``, ``[V]``.

        A single row, ``[1, V]``, is taken as it is.
        """
        if logits.shape[0] == 1:
            return logits[0]
        conditional, unconditional = logits.unbind(0)
        return unconditional + (conditional - unconditional) * self.cfg_scale

    def draw(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Draw a code, int64 ``[1]``, from ``logits [rows, V]`` before guidance.

        `noise` is one sample of Exp(1) a code, fp32 ``[V]``: dividing probabilities by it and taking the largest is an
        exact draw (the exponential race). Greedy draws need none. Values below the k-th largest are out; ties with it
        stay. Guidance and the division by the temperature happen in the dtype of the logits, as in the reference.
        """
        guided = self.guide(logits)
        if self.temperature == 0:
            return guided.argmax(0, keepdim=True)
        assert noise is not None
        scaled = guided / self.temperature
        smallest = scaled.topk(min(self.topk, len(scaled))).values[-1]
        # fp32 as autocast has it on CUDA: 16 bits cannot tell 8,197 probabilities apart.
        p = scaled.masked_fill(scaled < smallest, -torch.inf).softmax(0, dtype=torch.float32)
        return (p / noise).argmax(0, keepdim=True)


def frame_seed(seed: int, frame: int) -> int:
    """A 64-bit seed for one frame of a song: output `frame` of the SplitMix64 generator started at `seed`.

    Steele, Lea & Flood 2014. Neighbouring seeds and frames come out unrelated, and frame n needs no frame before it.
    """
    z = (seed + (frame + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def exponential_noise(generator: torch.Generator, codebooks: int, vocabulary: int) -> Tensor:
    """Noise for one frame, Exp(1), fp32 ``[codebooks, V]`` on the host. One draw a codebook, as in the reference."""
    noise = torch.empty(codebooks, vocabulary)
    for row in noise:
        row.exponential_(1, generator=generator)
    return noise
