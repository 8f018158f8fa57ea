"""The codec on a pretended CUDA device: what is copied, what is launched, and where the host waits."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from services.codec_worker.engines.base import DecodeState
from services.codec_worker.engines.native import NativeCodec
from services.codec_worker.model.arithmetic import _precision
from services.codec_worker.model.waveform_decoder import WaveformDecoder
from shared.errors import DeviceFull
from tests.unit.fake_cuda import Counts, FakeCuda, fake_cuda
from tests.unit.native_engines import TINY, one_thread

__all__ = ["one_thread"]

CODES = np.zeros((8, 400), np.int16)
STEPS = 3


@contextmanager
def ready(dtype: str = "float32") -> Iterator[tuple[NativeCodec, FakeCuda, Counts]]:
    """An engine on the pretended device, the device, and what moving the engine there took."""
    engine = NativeCodec(TINY, "cuda:0", dtype, steps=STEPS)
    engine.load()
    assert engine._schedule is not None
    with fake_cuda() as cuda:
        modulation = engine._schedule.modulation
        engine._schedule.modulation = type(modulation)(*map(cuda.convert, vars(modulation).values()))
        with cuda.counting() as moved:
            engine.to_device()
        yield engine, cuda, moved


def live_on_device() -> int:
    gc.collect()
    return sum(issubclass(type(thing), FakeTensor) and thing.device.type == "cuda" for thing in gc.get_objects())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_move_in_one_copy_and_no_step_of_a_window_waits(dtype: str) -> None:
    launches = []
    with ready(dtype) as (engine, cuda, moved):
        assert moved.to_device == 1 + 4, "the weights, and what the schedule has computed"
        assert moved.total == 0
        steps = engine.decode(CODES, seed=1)
        for stretches in (12, 3):
            with cuda.counting() as counts:
                next(steps)
            assert (counts.to_device, counts.from_device) == (3, 0), "codes, noise and context"
            for _ in range(STEPS - 1):
                with cuda.counting() as counts, cuda.no_waiting():
                    next(steps)
                assert (counts.to_device, counts.from_device) == (0, 0)
                launches.append(counts.total)
            for stretch in range(stretches):
                with cuda.counting() as counts:
                    assert next(steps).audio is not None
                handed_on = (stretches, stretch) == (12, 11)  # what the next window begins with
                assert (counts.to_device, counts.from_device) == (0, 2 if handed_on else 1)
        assert next(steps, None) is None
    assert len(set(launches[::2])) == 1
    assert max(launches) <= 150, "three layers"


def test_a_song_that_goes_on_runs_on_the_device_too() -> None:
    with ready() as (engine, _, _):
        steps = engine.advance(DecodeState(seed=1), CODES, ended=False)
        (state,) = [step.state for step in steps if step.state is not None]
        assert state.context.shape == (104, 256)
        again = DecodeState.unpack(state.pack())
        assert sum(step.audio is not None for step in engine.advance(again, CODES, ended=True)) == 3


@pytest.mark.parametrize(("dtype", "kernel"), [("float32", "efficient"), ("bfloat16", "flash")])
def test_attention_is_a_fused_kernel_and_never_cudnns(dtype: str, kernel: str) -> None:
    with ready(dtype) as (engine, cuda, _), cuda.counting() as counts:
        next(engine.decode(CODES, seed=1))
    attention = {name: count for name, count in counts.launches.items() if name.startswith("attention")}
    assert attention == {f"attention::{kernel}": 3}, "one a layer"


class Precisions(TorchFunctionMode):
    """Notes in which precision products and convolutions would be computed on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (F.linear, F.conv2d, F.scaled_dot_product_attention):
            self.seen.add(_precision())
        return func(*args, **(kwargs or {}))


def test_tf32_is_for_the_estimator_alone_and_nothing_of_it_stays() -> None:
    engine = NativeCodec(TINY, "cpu", "float32", steps=2)
    engine.load()
    engine.to_device()
    before = _precision()
    steps, seen = engine.decode(CODES[:, :40], seed=1), []
    for _ in range(4):
        with Precisions() as precisions:
            next(steps)
        seen.append(precisions.seen)
        assert _precision() == before
    estimator, exact = ("tf32", "tf32"), ("ieee", "ieee")
    assert seen == [{exact, estimator}, {estimator}, {exact}, {exact}], "the first step prepares the codes"


def fail(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize("how", ["ended", "given up", "failed"])
def test_work_memory_goes_back_to_the_driver_when_nothing_of_the_song_is_left(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ready() as (engine, _, _):
        weights, left = live_on_device(), list[int]()
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(live_on_device()))
        steps = engine.decode(CODES[:, :40], seed=1)
        for _ in range(STEPS + 1):
            next(steps)
        assert live_on_device() > weights
        assert not left
        if how == "ended":
            assert list(steps)
        elif how == "given up":
            steps.close()
        else:
            monkeypatch.setattr(WaveformDecoder, "forward", fail)
            with pytest.raises(DeviceFull):
                list(steps)
        assert left == [weights]
