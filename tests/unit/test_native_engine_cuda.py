"""The token engine on a pretended CUDA device: what it copies, launches and waits for. See `tests.unit.fake_cuda`."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from services.tokenizer_worker.cuda_graph import GraphRecorder, Recording
from services.tokenizer_worker.engines import native
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import kernels
from tests.bench import launches
from tests.unit.fake_cuda import FakeCuda, fake_cuda
from tests.unit.native_engines import DEMO, TINY, one_thread, prompt_of  # noqa: F401
from tests.unit.test_native_engine_batch import songs

SONG = Song(prompt=prompt_of(DEMO), max_frames=50, seed=1)


@pytest.fixture(autouse=True)
def _possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recording, "possible", True)
    monkeypatch.setattr(native, "missing_compiler", lambda: None)


@pytest.fixture(scope="module")
def _weights() -> NativeEngine:
    return loaded()


@pytest.fixture
def engine(_weights: NativeEngine) -> Iterator[NativeEngine]:
    """An engine on the pretended device, without songs."""
    with fake_cuda(kernels.launches):
        _weights.to_device()
        yield _weights
        _weights.to_host()


@pytest.fixture
def cuda(engine: NativeEngine) -> FakeCuda:
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    assert isinstance(mode, FakeCuda)
    return mode


def loaded(dtype: str = "bfloat16", slots: int = 4, int8: tuple[str, ...] = ()) -> NativeEngine:
    engine = NativeEngine(DEMO, "cuda:0", dtype, slots, int8=int8)
    engine.load()
    return engine


@pytest.mark.parametrize(
    ("dtype", "int8"),
    [
        ("float32", ()),
        ("bfloat16", ()),
        ("float16", ()),
        ("bfloat16", ("decoder",)),
        ("bfloat16", ("backbone", "decoder")),
    ],
)
def test_a_turn_of_songs_that_join_and_leave(dtype: str, int8: tuple[str, ...]) -> None:
    """In a frame nothing goes to the device, its codes come back, and the host waits for the frame before it."""
    engine = loaded(dtype, int8=int8)
    with fake_cuda(kernels.launches) as cuda:
        with cuda.counting() as moved:
            engine.to_device()
        assert (moved.to_device, moved.from_device) == (1, 0), "the weights are one copy"
        names = iter(songs().items())
        for name, song in [next(names), next(names)]:
            engine.admit(name, song)
        for _ in range(4):
            step(engine, cuda)
        engine.admit("c", next(names)[1])  # joins
        for _ in range(3):
            step(engine, cuda)
        engine.drop("a")  # leaves
        engine.admit("a", songs()["a"], np.zeros((8, 3), np.int16))  # goes on
        for _ in range(3):
            step(engine, cuda)
        assert cuda.counts.captures == 2, "of 2 and 4 places"
        with cuda.counting() as left:
            engine.to_host()
        assert left.emptied
        assert (left.to_device, left.from_device) == (0, 0)


def step(engine: NativeEngine, cuda: FakeCuda) -> None:
    """Make a frame, in which the host waits for the frame before it and for nothing else."""
    same = set(engine._frames.songs) == set(engine._going())
    with cuda.counting() as counts:
        engine.step()
    assert counts.from_device == 1
    assert counts.to_device == 0 or not same
    assert [why for why in counts.waits if why != "a copy to the device"] in ([], ["an event"])


def test_the_host_waits_for_nothing_while_a_frame_is_made(engine: NativeEngine, cuda: FakeCuda) -> None:
    engine.admit("a", SONG)
    with cuda.no_waiting(), torch.inference_mode():
        engine._frames.make()
        engine._frames.make()  # recorded
        engine._frames.make()  # played
    assert (cuda.counts.captures, cuda.counts.replays) == (1, 2)


@pytest.mark.parametrize("made", [0, 1, 20])
def test_an_admission_takes_few_copies(engine: NativeEngine, cuda: FakeCuda, made: int) -> None:
    engine.admit("first", SONG)
    engine.step()
    engine.drop("first")
    with cuda.counting() as counts:
        engine.admit("a", SONG, np.zeros((8, made), np.int16))
    assert counts.to_device == (4 if made else 5), "frames, prompt and its last token, two tables of the places"
    assert counts.from_device == 0


def test_a_frame_launches_as_many_kernels_for_many_songs_as_for_one() -> None:
    """At the official shapes. The limit goes down with the count, and never up."""
    few, many = launches.count(1), launches.count(16)
    assert few == many
    assert few["launches"] <= 526
    assert few["attention"] == 28 * 2 + 21, "one call a layer, of two kernels where splits are joined"
    assert (few["to_device"], few["from_device"]) == (0, 1)


def test_without_a_compiler_frames_are_made_one_song_at_a_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "missing_compiler", lambda: "there is no gcc")
    with caplog.at_level(logging.WARNING):
        engine = loaded()
    (note,) = engine.notes
    assert "there is no gcc" in note
    assert [record.message for record in caplog.records] == [note]
    with fake_cuda(kernels.launches) as cuda:
        engine.to_device()
        for name, song in songs().items():
            engine.admit(name, song)
        assert engine.step() == {}
        assert set(engine.step()) == set(songs())
        assert cuda.counts.matching("heartmula") == 0
        engine.to_host()


def test_heads_that_the_kernels_cannot_take_are_attended_to_in_plain_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (note,) = NativeEngine(TINY, "cuda:0", "bfloat16").notes
    assert "heads of 16 and 12 are not multiples of 8" in note


def test_a_card_for_which_triton_does_not_compile_is_used_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loaded()
    with fake_cuda(kernels.launches), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 1))
        for _ in range(2):
            engine.to_device()
            engine.to_host()
    (note,) = engine.notes
    assert "older" in note


def test_attention_of_a_prefill_is_memory_efficient(engine: NativeEngine, cuda: FakeCuda) -> None:
    engine.admit("a", replace(SONG), np.zeros((8, 9), np.int16))
    attention = {name for name in cuda.counts.launches if name.startswith("attention::")}
    assert attention <= {"attention::efficient", "attention::mask"}
    assert "attention::efficient" in attention
    still = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    assert still, "what is chosen holds there alone: the CPU has a flash kernel too"


@pytest.mark.usefixtures("engine")
def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append, raising=False)

    def fails() -> None:
        raise RuntimeError("not in a graph")

    with pytest.raises(RuntimeError, match="not in a graph"):
        GraphRecorder()(fails)
    assert streams == [torch.cuda.current_stream()]
