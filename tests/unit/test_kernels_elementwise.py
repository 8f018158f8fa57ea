"""Norms, the SwiGLU gate and noise as Triton kernels: results in the interpreter, beside those of the plain paths."""

import math

import pytest
import torch

pytest.importorskip("triton", minversion="3.7")  # the interpreter of older ones leaves its patches behind

from services.tokenizer_worker.model import kernels
from services.tokenizer_worker.model.kernels.noise import counter
from services.tokenizer_worker.model.kernels.triton_kernels import noise, norm, swiglu
from tests.unit.triton_interpreter import interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EPS = 1e-5


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit in 16 bits, and but for the order of additions and the exponential's last bit in fp32."""
    assert found.dtype == expected.dtype
    few = 2**-21 if found.dtype == torch.float32 else 0.0
    torch.testing.assert_close(found, expected, rtol=few, atol=0)


@dtypes
@pytest.mark.parametrize("width", [96, 1024])
def test_norm(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x, scale = (torch.randn(3, width) * torch.tensor([[1e-3], [1], [50]])).to(dtype), torch.rand(width).to(dtype)
    with interpreted():
        assert_same(norm.norm(x, scale, EPS), kernels.norm(x, scale, EPS))
        assert_same(norm.norm(torch.zeros_like(x), scale, EPS), torch.zeros_like(x))


@dtypes
def test_norm_of_a_sum(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, delta, scale = torch.randn(3, 96).to(dtype) * 9, torch.randn(3, 96).to(dtype), torch.randn(96).to(dtype)
    with interpreted():
        found = norm.add_norm(x, delta, scale, EPS)
    expected = kernels.add_norm(x, delta, scale, EPS)
    assert found[0].equal(expected[0])
    assert_same(found[1], expected[1])


@dtypes
def test_swiglu_gate(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    gate_up = torch.randn(2, 2 * 1100).to(dtype) * 5  # more than a program's share, and no multiple of it
    gate_up[0, :3] = torch.tensor([-200, 200, 0])
    with interpreted():
        assert_same(swiglu.silu_mul(gate_up), kernels.silu_mul(gate_up))


def test_noise_is_the_same_but_for_the_last_bit_of_the_logarithm() -> None:
    counters = torch.tensor([counter(seed, frame) for seed, frame in ((3, 0), (-(2**63), 7), (2**63 - 1, 999))])
    with interpreted():
        found = noise.noise(counters, 2, 1301)
    expected = kernels.noise(counters, 2, 1301)
    assert found.shape == (2, 3, 1301)
    assert (found != expected).float().mean() < 0.5
    torch.testing.assert_close(found, expected, rtol=2**-22, atol=0)


def test_noise_is_that_of_splitmix64() -> None:
    """Whole numbers from the generator as published, in Python's own integers."""
    codebooks, vocabulary, seed, frame = 2, 5, 11, 4

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    step = 0x9E3779B97F4A7C15
    start = mixed((seed + (frame + 1) * step) % 2**64)
    bits = [mixed((start + (n + 1) * step) % 2**64) >> 41 for n in range(codebooks * vocabulary)]
    expected = [-math.log((b + 0.5) / 2**23) for b in bits]
    counters = torch.tensor([counter(seed, frame)])
    assert kernels.noise(counters, codebooks, vocabulary).flatten().tolist() == pytest.approx(expected, rel=1e-6)
    with interpreted():
        assert noise.noise(counters, codebooks, vocabulary).flatten().tolist() == pytest.approx(expected, rel=1e-6)
