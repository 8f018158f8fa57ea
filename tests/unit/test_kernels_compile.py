"""Norms, gate, noise and sampler as they are compiled for cards, at the sizes of the official models."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", minversion="3.7")  # as in tests/unit/test_kernels_attention.py

from services.tokenizer_worker.model import kernels
from services.tokenizer_worker.model.kernels.triton_kernels import noise, norm, sampling, swiglu
from tests.unit.triton_compile import SHARED_MEMORY, Compiled, compile_launches

WIDTH, FEED_FORWARD, CODEBOOKS, VOCABULARY = 3072, 8192, 8, 8197
# ptxas keeps part of a correctly rounded division of 32 values a thread in memory on the newest cards.
SPILLED = {("sample_kernel", 120): 128}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(dtype: torch.dtype, capability: int, songs: int) -> Iterator[Compiled]:
    """Every kernel, each launched as often as its operator declares. Tensors have no contents here."""
    x, scale = empty(2 * songs, WIDTH, dtype=dtype), empty(WIDTH, dtype=dtype)
    gate_up, logits = empty(2 * songs, 2 * FEED_FORWARD, dtype=dtype), empty(2 * songs, VOCABULARY, dtype=dtype)
    counters, race = empty(songs, dtype=torch.int64), empty(songs, VOCABULARY)
    calls = {
        "norm": lambda: norm.norm(x, scale, 1e-5),
        "add_norm": lambda: norm.add_norm(x, x, scale, 1e-5),
        "silu_mul": lambda: swiglu.silu_mul(gate_up),
        "noise": lambda: noise.noise(counters, CODEBOOKS, VOCABULARY),
        "sample": lambda: sampling.sample(
            logits, race, empty(songs), counters, empty(songs), counters, counters, VOCABULARY - 4
        ),
    }
    for name, call in calls.items():
        found = compile_launches(call, capability)
        assert len(found) == kernels.launches(f"heartmula::{name}")
        yield from found


def assert_fits(kernel: Compiled, capability: int) -> None:
    assert kernel.shared <= 1024, kernel
    assert kernel.spilled <= SPILLED.get((kernel.name, capability), 0), kernel


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, 80), (torch.float16, 80), (torch.bfloat16, 90)], ids=str
)
def test_kernels_compile_for_cards_and_fit_them(dtype: torch.dtype, capability: int) -> None:
    for kernel in compiled(dtype, capability, 1):
        assert_fits(kernel, capability)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile_for_every_card(
    dtype: torch.dtype, capability: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for songs in (1, 3, 16):
        for kernel in compiled(dtype, capability, songs):
            assert_fits(kernel, capability)
            with capsys.disabled():
                print(
                    f"\nsm_{capability} {dtype} {kernel.name}: {kernel.registers} registers, {kernel.spilled} B spilled"
                )
