"""Matrix products on CPUs: which way is taken on which instruction set, and that all give the same product."""

import pytest
import torch
from torch.nn import functional as F

from shared.model import matrix_product
from shared.model.matrix_product import MANY, Way, choose, instruction_set, linear

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("instructions", "dtype", "inputs", "ways"),
    [
        # Measured on Xeons with AMX; also for CPUs that were not measured.
        ("AMX", FP32, 1024, {1: Way.LINEAR, 2: Way.LINEAR, 3: Way.TURNED, 32: Way.TURNED, 33: Way.LINEAR}),
        ("AMX", FP32, 8192, {2: Way.LINEAR, 3: Way.TURNED, 32: Way.TURNED}),
        ("AMX", BF16, 1024, {1: Way.VECTOR, 2: Way.TURNED, 128: Way.TURNED, 129: Way.LINEAR}),
        ("SVE256", FP32, 1024, {2: Way.LINEAR, 16: Way.TURNED, 200: Way.LINEAR}),
        ("without oneDNN", FP32, 1024, {2: Way.LINEAR, 16: Way.TURNED, 200: Way.LINEAR}),
        # One guided song has two rows.
        ("AVX2", FP32, 1024, {1: Way.ONEDNN, 2: Way.TURNED, 4: Way.TURNED, 5: Way.ONEDNN, MANY: Way.ONEDNN}),
        ("AVX2", FP32, 3072, {2: Way.TURNED, 3: Way.ONEDNN, 4: Way.ONEDNN}),
        ("AVX2", FP32, 8192, {2: Way.ONEDNN}),
        ("AVX512", FP32, 1024, {1: Way.ONEDNN, 2: Way.TURNED, 4: Way.TURNED, 5: Way.ONEDNN, MANY: Way.ONEDNN}),
        ("AVX512", FP32, 3072, {2: Way.ONEDNN, 4: Way.ONEDNN}),
        ("AVX2", BF16, 3072, {1: Way.VECTOR, 2: Way.TURNED, 7: Way.TURNED, 8: Way.WIDENED, MANY: Way.WIDENED}),
        ("AVX512", BF16, 3072, {1: Way.LINEAR, 16: Way.LINEAR, 32: Way.TURNED, 64: Way.TURNED, MANY: Way.LINEAR}),
        ("AVX2", torch.float16, 1024, {1: Way.LINEAR, 16: Way.LINEAR, MANY: Way.LINEAR}),
    ],
)
def test_the_way_follows_from_the_instruction_set(
    instructions: str, dtype: torch.dtype, inputs: int, ways: dict[int, Way]
) -> None:
    assert {rows: choose(instructions, dtype, rows, inputs, 2048) for rows in ways} == ways


def test_small_products_are_not_worth_a_call_of_onednn() -> None:
    ways = {rows: choose("AVX512", FP32, rows, 256, 1024) for rows in (1, 2, 4, 16)}
    assert ways == {1: Way.LINEAR, 2: Way.LINEAR, 4: Way.TURNED, 16: Way.ONEDNN}


@pytest.mark.parametrize(
    ("capability", "amx", "name"), [("AVX512", True, "AMX"), ("AVX512", False, "AVX512"), ("AVX2", True, "AVX2")]
)
def test_amx_counts_only_where_its_kernels_are_allowed(
    capability: str, amx: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert instruction_set() == name
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert instruction_set() == "without oneDNN"


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@torch.inference_mode()
def test_all_ways_give_the_same_product(way: Way, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a bias, of any shape, with several parts of converted weights."""
    if way is Way.ONEDNN and dtype == BF16 and instruction_set() == "AVX2":
        pytest.skip("oneDNN has no bfloat16 there, and `choose` does not ask for it")
    monkeypatch.setattr(matrix_product, "choose", lambda *_: way)
    monkeypatch.setattr(matrix_product, "_WIDENED_VALUES", 10 * 96)  # the last part has 7 rows
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((37, 96), (37,)))
    for shape in [(1, 1)] if way is Way.VECTOR else [(1, 1), (2, 1), (2, 5), (1, 40)]:
        x = torch.randn(*shape, 96, generator=generator).to(dtype)
        for add in (None, bias):
            exact = F.linear(x.double(), weight.double(), None if add is None else add.double())
            off = (linear(x, weight, add).double() - exact).abs().max() / exact.abs().max()
            assert off < (1e-6 if dtype == FP32 else 0.01), (shape, add is None)


@torch.inference_mode()
def test_a_sequence_is_multiplied_alike_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(instructions: str, dtype: torch.dtype, rows: int, *_: int) -> Way:
        asked.append(rows)
        return Way.LINEAR

    monkeypatch.setattr(matrix_product, "choose", record)
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    linear(x, weight)
    linear(x, weight, sequence=True)
    assert asked == [6, MANY]


def test_gradients_reach_the_weights() -> None:
    """Training uses the codec's layers."""
    weight = torch.randn(5, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(torch.randn(3, 8), weight, sequence=True).sum(), weight)
    assert gradient.abs().sum() > 0
