"""Products with int8 weights as a Triton kernel: results in the interpreter, and what compiles for cards."""

import re

import pytest
import torch

pytest.importorskip("triton", minversion="3.7")  # the interpreter of older ones leaves its patches behind

from services.tokenizer_worker.model import kernels
from services.tokenizer_worker.model.kernels.triton_kernels import int8
from tests.unit.triton_compile import SHARED_MEMORY, Compiled, compile_launches
from tests.unit.triton_interpreter import interpreted

# N and K of the backbone's matrices: attention in and out, gate and up, down.
SHAPES = [(5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 33, 300), (2, 16, 256), (17, 70, 520), (64, 32, 64)])
def test_product(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, inputs).to(dtype)
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    scale = (torch.rand(outputs) * 0.01).to(dtype)
    with interpreted():
        found = int8.int8_product(x, weight, scale)
    expected = kernels.int8_product(x, weight, scale)
    # Sums are in fp32 in another order; rounded to 16 bits they can fall on either side.
    near = {FP32: 0.0, BF16: 2**-8, FP16: 2**-10}[dtype]
    torch.testing.assert_close(found, expected, rtol=near, atol=1e-6 * float(expected.abs().max()))


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(1)
    x = torch.randn(20, 300)
    weight, scale = torch.randint(-128, 128, (40, 300), dtype=torch.int8), torch.rand(40)
    with interpreted():
        alone, together = (int8.int8_product(rows, weight, scale) for rows in (x[:1], x))
    assert alone[0].equal(together[0])


def compiled(rows: int, outputs: int, inputs: int, dtype: torch.dtype, capability: int) -> Compiled:
    x, weight = (torch.empty(n, inputs, dtype=t, device="meta") for n, t in ((rows, dtype), (outputs, torch.int8)))
    scale = torch.empty(outputs, dtype=dtype, device="meta")
    (found,) = compile_launches(lambda: int8.int8_product(x, weight, scale), capability)
    return found


def assert_fits(kernel: Compiled) -> None:
    # Two programs fit a multiprocessor with the least memory: 100 kB, of which each takes 1 kB more.
    assert kernel.shared <= 49 * 1024
    assert kernel.spilled == 0


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(2, 3072, 8192), (32, 16384, 3072)])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_cards_and_fits_them(rows: int, outputs: int, inputs: int, capability: int) -> None:
    for dtype in (FP32, BF16, FP16):
        found = compiled(rows, outputs, inputs, dtype, capability)
        assert_fits(found)
        # Weights are read 16 bytes at a time and ahead.
        assert set(re.findall(r"cp\.async\.\w+\.shared\.global \[.*\], (\S+),", found.ptx)) == {"0x10"}
        assert "ld.global.b8" not in found.ptx
        assert "tf32" not in found.ptx  # fp32 is not rounded
        assert (dtype == FP32) == ("mma.sync" not in found.ptx)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_it_compiles_for_every_card(capability: int, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    for shape in SHAPES:
        for rows in (1, 16, 64):
            found = compiled(rows, *shape, dtype, capability)
            assert_fits(found)
            with capsys.disabled():
                print(f"\nsm_{capability} {dtype} {rows} x {shape}: {found.shared} B, {found.registers} registers")
