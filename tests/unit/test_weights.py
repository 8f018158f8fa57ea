"""Weights in one block, moved to a device and back. A second block of host memory replaces the memory of a GPU."""

import contextlib
import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from services.codec_worker.engines.native import NativeCodec
from services.tokenizer_worker.engines.native import NativeEngine
from shared.errors import DeviceBroken, DeviceFull, PhaseError
from shared.model.weights import ALIGNMENT, Weights, device_memory
from tests.unit.native_engines import TINY

CPU = torch.device("cpu")


class Model(nn.Module):
    """A model with tensors of every kind, in sizes that fit no alignment."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Parameter(torch.empty(3, dtype=torch.uint8), requires_grad=False)
        self.scalar = nn.Parameter(torch.empty((), dtype=torch.bfloat16))
        self.words = nn.Parameter(torch.empty(50, 7))
        self.linear = nn.Linear(5, 11, dtype=torch.float64)
        self.layers = nn.ModuleList(nn.Conv1d(3, 2, 3, dtype=torch.float16) for _ in range(3))
        self.register_buffer("table", torch.arange(5, device="cpu") * (1 + 2j), persistent=False)


def blank() -> Model:
    with torch.device("meta"):
        return Model()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def fill(model: nn.Module) -> Callable[[], None]:
    """Fill every parameter in place, each with other values."""

    def write() -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(0, 99, generator=generator))

    return write


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


def same(model: nn.Module, wanted: dict[str, Tensor]) -> bool:
    here = tensors(model)
    return here.keys() == wanted.keys() and all(torch.equal(here[name], wanted[name]) for name in wanted)


def blocks(model: nn.Module) -> dict[int, set[str]]:
    """Address of every storage, and its contents."""
    found: dict[int, set[str]] = {}
    for name, tensor in tensors(model).items():
        found.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
    return found


@pytest.fixture
def expected() -> dict[str, Tensor]:
    """Values of a model that was built in the ordinary way."""
    model = Model()
    with torch.no_grad():
        fill(model)()
    return values(model)


def loaded(*, separate: bool, host_only: tuple[str, ...] = ()) -> tuple[Model, Weights]:
    """Load a model into host memory; with `separate` its device has memory of its own."""
    model = blank()
    weights = Weights(model, CPU, host_only=host_only)
    weights._copies = separate
    weights.load(fill(model))
    return model, weights


@pytest.mark.parametrize("separate", [True, False])
def test_values_survive_every_move(separate: bool, expected: dict[str, Tensor]) -> None:
    model, weights = loaded(separate=separate, host_only=("words",))
    assert same(model, expected)
    for _ in range(2):
        weights.to_device()
        assert same(model, expected)
        weights.to_host()
        assert same(model, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_everything_lies_aligned_in_one_block() -> None:
    model, weights = loaded(separate=True, host_only=("words",))
    (host,) = blocks(model)
    weights.to_device()
    on_device = blocks(model)
    assert on_device.pop(host) == {"words"}
    ((device, names),) = on_device.items()
    assert names == tensors(model).keys() - {"words"}
    for name, tensor in tensors(model).items():
        assert (tensor.data_ptr() - (host if name == "words" else device)) % ALIGNMENT == 0, name


def test_what_moves_is_as_large_as_it_says() -> None:
    model = blank()
    known = Weights(model, CPU, host_only=("words",)).nbytes
    model, weights = loaded(separate=True, host_only=("words",))
    host = model.words.untyped_storage().nbytes()
    weights.to_device()
    moved = [tensor for name, tensor in tensors(model).items() if name != "words"]
    assert weights.nbytes == known == moved[0].untyped_storage().nbytes()
    assert sum(t.nbytes for t in moved) <= known < sum(t.nbytes for t in moved) + ALIGNMENT * len(moved)
    assert host - known == -(-model.words.nbytes // ALIGNMENT) * ALIGNMENT


def test_the_cpu_reads_the_weights_where_they_are() -> None:
    model, weights = loaded(separate=False)
    before = blocks(model)
    assert len(before) == 1
    for move in (weights.to_device, weights.to_host):
        move()
        assert blocks(model) == before


def test_leaving_the_device_keeps_nothing_there() -> None:
    model, weights = loaded(separate=True, host_only=("words",))
    weights.to_device()
    block = StorageWeakRef(model.table.untyped_storage())  # type: ignore[no-untyped-call]
    host = StorageWeakRef(model.words.untyped_storage())  # type: ignore[no-untyped-call]
    assert not block.expired()  # type: ignore[no-untyped-call]
    weights.to_host()
    assert block.expired()  # type: ignore[no-untyped-call]
    assert not host.expired()  # type: ignore[no-untyped-call]


def test_what_happens_on_the_device_stays_there(expected: dict[str, Tensor]) -> None:
    """Moving back takes the host's weights, also after those on the device were changed."""
    model, weights = loaded(separate=True)
    weights.to_device()
    for parameter in model.parameters():
        parameter.zero_()
    weights.to_host()
    assert same(model, expected)


def test_nothing_moves_before_it_is_loaded() -> None:
    model = blank()
    weights = Weights(model, CPU)
    weights.to_host()

    def broken() -> None:
        raise OSError("damaged")

    with pytest.raises(OSError, match="damaged"):
        weights.load(broken)
    with pytest.raises(PhaseError, match="not loaded"):
        weights.to_device()
    assert not weights.on_device


def test_a_full_device_leaves_the_weights_on_the_host(
    expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = loaded(separate=True)
    before = blocks(model)

    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 5 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", full)
        with pytest.raises(DeviceFull, match="5 GiB"):
            weights.to_device()
    assert not weights.on_device
    assert blocks(model) == before
    weights.to_device()
    assert same(model, expected)


@pytest.mark.parametrize("kind", [NativeEngine, NativeCodec])
def test_the_engines_load_straight_into_their_block(kind: type[NativeEngine | NativeCodec]) -> None:
    """With a device that has memory of its own, the host keeps only what stays there."""
    engine = kind(TINY, "cpu", "bfloat16")
    engine._weights._copies = True
    engine.load()
    (host,) = blocks(engine._model)
    engine.to_device()
    on_device = blocks(engine._model)
    stays = {"text_embeddings"} if isinstance(engine, NativeEngine) else set(engine._model.time_weights)
    assert on_device.pop(host, set()) == stays
    assert len(on_device) == 1
    assert list(engine._model.parameters())[-1].untyped_storage().nbytes() == engine.weight_bytes
    engine.to_host()
    assert blocks(engine._model).keys() == {host}


# Page-locking, with a stand-in for the CUDA runtime


class Runtime:
    """Knows which memory is page-locked; refuses when `error` is not 0."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert address not in self.locked
        if self.error == 0:
            self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime(request.param)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return runtime


def turns(weights: Weights) -> None:
    """Run two turns. Copies go to the CPU in any case."""
    weights._device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", lambda tensor, *_, **__: tensor.clone())
        for _ in range(2):
            weights.to_device()
            weights.to_host()


@pytest.mark.parametrize("runtime", [0], indirect=True)
def test_host_memory_is_page_locked_once_for_as_long_as_it_lives(runtime: Runtime) -> None:
    model, weights = loaded(separate=True, host_only=("words",))
    (host,) = blocks(model)
    assert not runtime.locked
    turns(weights)
    assert runtime.locked == {host: weights.nbytes}
    del weights
    assert not runtime.locked


@pytest.mark.parametrize("runtime", [2], indirect=True)
def test_without_page_locking_weights_move_all_the_same(
    runtime: Runtime, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stale(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    model, weights = loaded(separate=True)
    monkeypatch.setattr(torch, "ones", stale)
    with caplog.at_level(logging.WARNING):
        turns(weights)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "CUDA error 2" in caplog.text
    assert same(model, expected)


@pytest.mark.parametrize(
    ("raised", "mapped"), [(torch.OutOfMemoryError, DeviceFull), (torch.AcceleratorError, DeviceBroken)]
)
def test_what_a_driver_raises_is_mapped(raised: type[Exception], mapped: type[Exception]) -> None:
    with pytest.raises(mapped, match="why"), device_memory():
        raise raised("why")
