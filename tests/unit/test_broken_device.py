"""A CUDA error that stays: every call after it fails too, and the first error is the one that reaches the worker."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from services.codec_worker.engines.base import CodecEngine
from services.codec_worker.engines.heartlib import HeartlibCodec
from services.codec_worker.engines.native import NativeCodec
from services.tokenizer_worker.engines.native import NativeEngine
from shared.errors import DeviceBroken, DeviceFull, SongError
from shared.model.weights import device_memory, free_unused
from tests.unit.native_engines import TINY

CODES = np.zeros((8, 40), np.int16)
CUDA = torch.device("cuda:0")


def fail(*_: object, **__: object) -> NoReturn:
    raise torch.AcceleratorError("illegal memory access")


def fail_again(*_: object, **__: object) -> NoReturn:
    raise torch.AcceleratorError("asked of a broken device")


@pytest.fixture(autouse=True)
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", fail_again)


def native(monkeypatch: pytest.MonkeyPatch) -> CodecEngine:
    """A codec that has gone to the device, on which its first step fails."""
    engine = NativeCodec(TINY, "cuda:0", "float32", steps=2)
    engine._ready = range(2)  # type: ignore[assignment]  # a schedule of two steps
    monkeypatch.setattr(NativeCodec, "_begin", fail)
    return engine


def heartlib(monkeypatch: pytest.MonkeyPatch) -> CodecEngine:
    """A reference codec that has gone to the device; it fails where its waveform is waited for."""
    reference: Any = SimpleNamespace(detokenize=lambda *_, **__: SimpleNamespace(float=fail))
    monkeypatch.setitem(sys.modules, "heartlib.heartcodec.modeling_heartcodec", reference)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: nullcontext())
    engine = HeartlibCodec(TINY, "cuda:0", "float32")
    engine._model, engine._on_device = reference, True
    return engine


@pytest.mark.parametrize("make", [native, heartlib])
def test_a_codec_reports_the_error_that_broke_the_device(
    make: Callable[[pytest.MonkeyPatch], CodecEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceBroken, match="illegal memory access"):
        list(make(monkeypatch).decode(CODES, seed=1))


def test_memory_that_cannot_be_given_back_is_a_broken_device(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = native(monkeypatch).decode(CODES, seed=1)
    monkeypatch.setattr(NativeCodec, "_begin", lambda *_: SimpleNamespace(finished=False))
    monkeypatch.setattr(NativeCodec, "_advance", lambda *_: None)
    next(steps)
    with pytest.raises(DeviceBroken, match="asked of a broken device"):
        steps.close()


def test_a_song_that_leaves_the_batch_reports_a_broken_device() -> None:
    engine = NativeEngine(TINY, "cuda:0", "float32", 1)
    engine._songs["a"] = SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(DeviceBroken, match="asked of a broken device"):
        engine.drop("a")


def fail_with(error: Exception) -> None:
    try:
        with device_memory():
            raise error
    finally:
        free_unused(CUDA)


@pytest.mark.parametrize("first", [DeviceFull("no room"), SongError("too long")])
def test_any_other_error_gives_way_to_the_broken_device(first: Exception) -> None:
    with pytest.raises(DeviceBroken, match="asked of a broken device"):
        fail_with(first)


def test_the_wait_for_the_weights_reports_a_broken_device(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = NativeCodec(TINY, "cpu", "float32")
    engine.load()
    engine._weights._device, engine._weights._copies = CUDA, True
    monkeypatch.setattr(engine._weights, "_page_lock", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(DeviceBroken, match="illegal memory access"):
        engine.to_device()


def test_a_device_that_is_sound_gets_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = list[None]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    free_unused(torch.device("cpu"))
    assert not emptied
    with pytest.raises(DeviceFull):
        fail_with(torch.OutOfMemoryError())
    assert len(emptied) == 1
