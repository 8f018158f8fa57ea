"""Weights that are kept as int8."""

import logging

import numpy as np
import pytest
import torch

from services.tokenizer_worker.__main__ import build_engine
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import kernels, linear
from services.tokenizer_worker.model.linear import Matrix
from shared.errors import ConfigError
from shared.settings import Settings
from tests.unit.fake_cuda import DEVICE, fake_cuda
from tests.unit.native_engines import DEMO, TINY, generate, one_thread, prompt_of, ready  # noqa: F401


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_off_by_no_more_than_half_a_step(dtype: torch.dtype) -> None:
    """Products of any number of rows equal the product with the dequantised weights."""
    values = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 96)[:, None]
    values[5] = 0
    matrix = Matrix(96, 64, dtype, int8=True)
    matrix.fill(values[:40])
    matrix.fill(values[40:], 40)
    assert matrix.scale is not None
    step = matrix.scale.float()[:, None]
    kept = matrix.weight * step
    assert (kept - values).abs().le(0.51 * step).float().mean() > 0.99
    assert (kept - values).abs().le(1.01 * step).all()  # the largest of a row, where its step was rounded down
    assert not kept[5].any()
    for rows in (1, 2, 7, 32, 33, 100):
        x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)
        exact = (x.double() @ kept.double().T)[0]
        off = (matrix(x)[0].double() - exact).abs() / exact.abs().amax(0).clamp(min=1e-9)
        assert off.max() < (1e-5 if dtype == torch.float32 else 0.02), rows


def test_int8_takes_a_quarter_of_float32_and_still_makes_songs() -> None:
    song = Song(prompt=prompt_of(DEMO), max_frames=20, topk=5, seed=3)
    plain = ready(DEMO)
    sizes = [plain.weight_bytes]
    wholes = [generate(plain, song)]
    for int8 in (("decoder",), ("backbone", "decoder")):
        engine = NativeEngine(DEMO, "cpu", "float32", int8=int8)
        engine.load()
        engine.to_device()
        sizes.append(engine.weight_bytes)
        wholes.append(generate(engine, song))
        assert wholes[-1].shape == (8, 20)
        assert np.array_equal(generate(engine, song), wholes[-1])
    assert sizes[0] > sizes[1] > sizes[2]
    matrices = [p for name, p in plain._model.named_parameters() if "blocks" in name and p.ndim == 2]
    saved = sizes[0] - sizes[2]
    assert 0.7 < saved / sum(p.nbytes for p in matrices) < 0.8  # three quarters, less the scales; and the projection
    # The first frame follows from the whole prompt, and is the same or nearly so.
    assert all((whole[:, 0] == wholes[0][:, 0]).sum() >= 6 for whole in wholes)


def test_the_setting_chooses_int8_weights() -> None:
    sizes = []
    for setting, name in (("off", "HeartMuLa-oss-demo"), ("decoder", "-int8-decoder"), ("all", "-int8-all")):
        engine, _, model = build_engine(Settings(device="cpu", int8=setting), TINY)
        sizes.append(engine.weight_bytes)
        assert setting == "off" or model.endswith(name)  # tokens of one are not gone on with by the other
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_reference_refuses_int8() -> None:
    with pytest.raises(ConfigError, match="HEARTMULA_INT8 is the native engine's: unset it"):
        build_engine(Settings(engine="heartlib", int8="all"), TINY)


def test_compilation_is_accepted_and_said_to_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build_engine(Settings(device="cpu", compile=True), TINY)
    (record,) = [record for record in caplog.records if "HEARTMULA_COMPILE" in record.message]
    assert "has no effect" in record.message


@pytest.mark.parametrize(("compiler", "capability"), [(True, (7, 5)), (False, (9, 0)), (True, (6, 1))])
def test_on_cuda_few_rows_are_a_product_of_bytes(
    compiler: bool, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch for up to 64 rows; beyond, and where kernels cannot be compiled, the weights are converted first."""
    monkeypatch.setattr(linear, "missing_compiler", lambda: None if compiler else "no compiler")
    with fake_cuda(kernels.launches) as cuda, torch.inference_mode(), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        able = compiler and capability >= (7, 5)
        with torch.device(DEVICE):
            matrix = Matrix(96, 64, torch.bfloat16, int8=True)
        for rows in (1, 2, 64, 65):
            x = torch.empty(rows, 1, 64, dtype=torch.bfloat16, device=DEVICE)
            with cuda.counting() as counts:
                assert matrix(x).shape == (rows, 1, 96)
            assert counts.matching("int8_product") == (able and rows <= 64), rows
            assert (counts.total == 1) == (able and rows <= 64), rows
