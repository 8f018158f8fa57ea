"""The sampler as a Triton kernel: the codes that it draws in the interpreter, beside those of the plain path."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.7")  # the interpreter of older ones leaves its patches behind

from services.tokenizer_worker.model import kernels
from services.tokenizer_worker.model.kernels.triton_kernels import sampling
from tests.unit.triton_interpreter import interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SONGS = 10
# Song by song: greedy, k of 1, guided and not, k of the whole vocabulary and beyond.
TEMPERATURES = (1.0, 0.7, 0.0, 1.3, 1.0, 0.0, 0.9, 1.0, 0.05, 1e3)
KEPT = (5, 50, 3, 10**9, 1, 50, 8, 20, 6, 40)
SCALES = (1.5, 1.0, 1.5, 1.0, 3.0, 1.0, 1.0, 0.0, 1.5, 2.0)
LENGTHS = torch.tensor([9, 10, 11] * 4)
NO_END = 2**31 - 1


def both(
    logits: Tensor, noise: Tensor, temperatures: Tensor, kept: Tensor, scales: Tensor, least: int = 0, end: int = NO_END
) -> tuple[Tensor, Tensor]:
    """What the kernel draws and what is expected. Songs are 9, 10 and 11 positions long in turn."""
    lengths = LENGTHS[: len(kept)]
    arguments = (logits, noise, temperatures, kept, scales, lengths, torch.full_like(lengths, least), end)
    with interpreted():
        found = sampling.sample(*arguments)
    return found, kernels.sample(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    for vocabulary, spread in ((1, 1.0), (7, 3.0), (64, 0.01), (100, 20.0), (1000, 3.0), (8197, 2.0)):
        logits = (torch.randn(2 * SONGS, vocabulary) * spread).to(dtype)
        logits[SONGS:][torch.tensor(SCALES) == 1] = torch.nan  # is not looked at
        noise = torch.empty(SONGS, vocabulary).exponential_()
        found, expected = both(logits, noise, torch.tensor(TEMPERATURES), torch.tensor(KEPT), torch.tensor(SCALES))
        assert found.equal(expected), vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_equal_or_no_ordinary_numbers(dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    small = torch.finfo(dtype).smallest_normal
    rows = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1],  # all are equal, so all stay
            [0.0, -0.0, -1, 0.0, -2, -3],  # a zero ties with a negative one
            [-0.0, 0.0, -1, 1, -0.0, -3],
            [-5, -3, -inf, -3, -inf, -4],
            [-inf, -inf, -inf, 2, -inf, -inf],
            [-inf, -inf, -inf, -inf, -inf, -inf],
            [1, nan, 3, 2, 0, 0],
            [1, -nan, 3, 2, 0, 0],
            [1, inf, 3, 2, inf, 0],
            [small, -small, 0, small / 2, -small / 2, 2 * small],
        ]
    ).to(dtype)
    assert len(rows) == SONGS
    logits, scales = torch.cat((rows, torch.zeros_like(rows))), torch.ones(SONGS)
    torch.manual_seed(6)
    for k, temperature in ((1, 1.0), (2, 1.0), (6, 1.0), (2, 0.0)):
        noise = torch.empty(rows.shape).exponential_()
        temperatures, kept = torch.full((SONGS,), temperature), torch.full((SONGS,), k)
        found, expected = both(logits, noise, temperatures, kept, scales)
        assert found.equal(expected), (k, temperature)


AT_THEIR_LEAST = (torch.full((8,), 7), torch.full((8,), 7), 0)  # each code may be drawn


def test_exactly_the_k_largest_and_ties_can_be_drawn() -> None:
    """The noise lets every value win in turn, so what is drawn tells what was kept."""
    row = torch.tensor([3.0, -1, 2, 2.5, 2, -7, 2, 0]).repeat(2 * 8, 1)
    noise = torch.full((8, 8), 1e6).fill_diagonal_(1e-6)
    drawn = {}
    for k in (1, 2, 3, 6, 7):
        with interpreted():
            found = sampling.sample(row, noise, torch.ones(8), torch.full((8,), k), torch.ones(8), *AT_THEIR_LEAST)
        drawn[k] = set(found.tolist())
    assert drawn == {1: {0}, 2: {0, 3}, 3: {0, 2, 3, 4, 6}, 6: {0, 2, 3, 4, 6, 7}, 7: {0, 1, 2, 3, 4, 6, 7}}


def test_a_negative_zero_ties_with_zero() -> None:
    row = torch.tensor([0.0, -0.0, -1, 0.0, -2, -3, -4, -5]).repeat(2 * 8, 1)
    noise = torch.full((8, 8), 1e6).fill_diagonal_(1e-6)
    with interpreted():
        found = sampling.sample(row, noise, torch.ones(8), torch.full((8,), 2), torch.ones(8), *AT_THEIR_LEAST)
    assert set(found.tolist()) == {0, 1, 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_guidance_and_temperature_are_rounded_as_by_pytorch(dtype: torch.dtype) -> None:
    """Logits of which many are equal once they are rounded: the first of the largest tells how they were."""
    torch.manual_seed(7)
    logits = (torch.randn(2 * 12, 100) * 0.1).to(dtype)
    logits[:12] += 4
    temperatures = torch.tensor([0.0, 0.7, 1.3]).repeat(4)
    kept, scales = torch.ones(12, dtype=torch.int64), torch.tensor([1.5, 1.5, 1.5, 2.3]).repeat(3)
    found, expected = both(logits, torch.ones(12, 100), temperatures, kept, scales)
    assert found.equal(expected)


@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[::2]] + [torch.bfloat16], ids=str
)
def test_before_its_least_length_a_song_has_no_codes_that_end_it(dtype: torch.dtype) -> None:
    """It draws as from a smaller vocabulary; songs at their least length draw as ever."""
    torch.manual_seed(8)
    numbers = (torch.tensor(TEMPERATURES), torch.tensor(KEPT), torch.tensor(SCALES))
    early = LENGTHS[:SONGS] < 11
    ended = 0
    for vocabulary, end in ((8, 1), (64, 60), (100, 64), (1000, 992)):
        logits = torch.randn(2 * SONGS, vocabulary)
        logits[:, end:] += 4
        logits = logits.to(dtype)
        noise = torch.empty(SONGS, vocabulary).exponential_()
        found, expected = both(logits, noise, *numbers, least=11, end=end)
        assert found.equal(expected), vocabulary
        smaller, _ = both(logits[:, :end], noise[:, :end], *numbers)
        unbound, _ = both(logits, noise, *numbers)
        assert found.equal(torch.where(early, smaller, unbound)), vocabulary
        ended += int((unbound[early] >= end).sum())
    assert ended > 5, "no song would have ended"


def test_codes_that_end_a_song_and_are_no_numbers_are_not_looked_at_before() -> None:
    logits = torch.tensor([1.0, 2, torch.nan, torch.inf]).repeat(2 * SONGS, 1)
    temperatures, kept, scales = torch.zeros(SONGS), torch.ones(SONGS, dtype=torch.int64), torch.ones(SONGS)
    found, expected = both(logits, torch.ones(SONGS, 4), temperatures, kept, scales, least=99, end=2)
    assert found.equal(expected)
    assert found.tolist() == [1] * SONGS
