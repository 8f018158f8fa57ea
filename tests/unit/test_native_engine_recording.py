"""Frames made in buckets of places, recorded and played again; frames pending between two steps.

On CUDA the recorder is a CUDA graph. Here it is a trace of every operation, which plays the same operations on the same
tensors: whatever the host had decided while it was recorded, it would decide again.
"""

import logging
import weakref
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from services.tokenizer_worker import cuda_graph
from services.tokenizer_worker.cuda_graph import Recording, Work
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.frames import BucketFrames, bucket_size
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import HeartMuLa, KVCache
from shared.errors import DeviceBroken, DeviceFull
from shared.model.checkpoint import Checkpoint
from tests.unit.native_engines import DEMO, TINY, generate, one_thread, prompt_of, ready  # noqa: F401
from tests.unit.test_native_engine_batch import mingle, songs


class Tracer:
    """A recorder on the CPU, for one engine. `failures` are raised first, one a recording."""

    def __init__(self, frames: BucketFrames, failures: list[Exception]) -> None:
        self.frames, self.failures = frames, failures
        self.recorded = self.played = 0

    def __call__(self, work: Work) -> Work:
        if self.failures:
            raise self.failures.pop()
        changing = [t for places, _ in self.frames._buckets.values() for t in (places._integers, places.embedded)]
        before = [tensor.clone() for tensor in changing]
        graph = make_fx(work)()  # does the work as well, which a CUDA graph does not
        for tensor, value in zip(changing, before, strict=True):
            tensor.copy_(value)
        self.recorded += 1

        def play() -> None:
            self.played += 1
            graph()

        return play


def recording(
    checkpoint: Checkpoint = DEMO, slots: int = 1, failures: list[Exception] | None = None
) -> tuple[NativeEngine, Tracer]:
    """An engine that makes frames as on CUDA, by the operators' plain paths."""
    engine = ready(checkpoint, slots=slots)
    tracer: Tracer
    engine._frames = frames = BucketFrames(engine._model, checkpoint.gen.audio_eos_id, lambda: tracer)
    tracer = Tracer(frames, failures or [])
    return engine, tracer


@pytest.fixture(autouse=True)
def _possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recording, "possible", True)
    monkeypatch.setattr(Recording, "announced", False)


@pytest.mark.parametrize(
    ("checkpoint", "cfg_scale"), [(DEMO, 1.0), (DEMO, 1.5), (TINY, 1.5)], ids=["alone", "guided", "golden"]
)
def test_a_recorded_frame_is_the_next_one_every_time_it_is_played(
    cfg_scale: float, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    song = Song(prompt=prompt_of(checkpoint), max_frames=20, topk=5, seed=3, cfg_scale=cfg_scale)
    alone = generate(ready(checkpoint), song)
    engine, tracer = recording(checkpoint)
    with caplog.at_level(logging.INFO):
        assert np.array_equal(generate(engine, song), alone)
    assert tracer.recorded == 1, "a recording serves every position"
    assert tracer.played == 19
    assert len([r for r in caplog.records if "recorded as a CUDA graph in" in r.message]) == 1


def test_a_bucket_is_recorded_once_whoever_joins_and_leaves() -> None:
    batch = songs()
    alone = {name: generate(ready(DEMO), song) for name, song in batch.items()}
    engine, tracer = recording(slots=3)
    for _ in range(2):
        together = mingle(engine, batch)
        for name in batch:
            assert np.array_equal(together[name], alone[name]), name
    assert tracer.recorded == 3, "of 1, 2 and 4 places"
    assert tracer.played > 30
    engine.to_host()
    engine.to_device()
    assert np.array_equal(generate(engine, batch["a"]), alone["a"])
    assert tracer.recorded == 4, "when the weights move, addresses change"


def test_buckets_are_powers_of_two_and_then_multiples_of_32() -> None:
    assert [bucket_size(n) for n in (1, 2, 3, 4, 5, 9, 16, 17, 32, 33, 64, 65, 256)] == [
        *(1, 2, 4, 4, 8, 16, 16, 32, 32, 64, 64, 96, 256)
    ]


def cuda_error(code: int) -> Exception:
    """An error of CUDA's as torch raises it."""
    error = torch.AcceleratorError(f"CUDA error {code}")
    error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    "refusal", [RuntimeError("not permitted here"), *map(cuda_error, (900, 901, 904, 908))], ids=str
)
def test_where_frames_cannot_be_recorded_they_are_made_all_the_same(
    refusal: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    song = Song(prompt=prompt_of(DEMO), max_frames=8, topk=5, seed=3)
    alone = generate(ready(DEMO), song)
    for _ in range(2):
        engine, tracer = recording(failures=[refusal])
        with caplog.at_level(logging.WARNING):
            assert np.array_equal(generate(engine, song), alone)
        assert tracer.recorded == 0
    (warning,) = [r for r in caplog.records if "cannot be recorded" in r.message]
    assert str(refusal) in warning.message


@pytest.mark.parametrize("code", [700, 719, 999])
def test_a_device_that_breaks_while_recording_is_broken(code: int) -> None:
    engine, _ = recording(failures=[cuda_error(code)])
    engine.admit("song", Song(prompt=prompt_of(DEMO), max_frames=8, topk=5, seed=3))
    engine.step()
    with pytest.raises(DeviceBroken):
        engine.step()
    assert Recording.possible


def chained(first: Exception, last: Exception) -> Exception:
    """What a capture raises whose end failed because of an error in it."""
    last.__context__ = first
    return last


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("1 GiB"),
        cuda_error(2),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        chained(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), cuda_error(901)),
    ],
    ids=["allocator", "driver", "cublas", "triton", "hidden"],
)
def test_without_memory_for_a_recording_frames_go_on_and_it_is_tried_again(
    full: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "_PATIENCE", 3)
    engine, tracer = recording(failures=[full])
    song = Song(prompt=prompt_of(DEMO), max_frames=8, topk=5, seed=3)
    assert np.array_equal(generate(engine, song), generate(ready(DEMO), song))
    assert (tracer.recorded, tracer.played) == (1, 3), "the second frame failed to be recorded, the sixth did not"


def test_a_fault_that_triton_reports_first_breaks_the_device() -> None:
    engine, _ = recording(failures=[RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")])
    engine.admit("song", Song(prompt=prompt_of(DEMO), max_frames=8, topk=5, seed=3))
    engine.step()
    with pytest.raises(DeviceBroken):
        engine.step()


def ahead(slots: int = 1) -> NativeEngine:
    """An engine that leaves a frame pending, as on CUDA."""
    engine = ready(DEMO, slots=slots)
    engine._ahead = 1
    return engine


def test_the_first_frame_of_a_song_comes_with_the_second_step() -> None:
    engine, song = ahead(2), Song(prompt=prompt_of(DEMO), max_frames=3, topk=5, seed=3)
    engine.admit("a", song)
    alone = generate(ready(DEMO), song)
    assert engine.step() == {}
    engine.admit("b", song)
    seen: list[tuple[str, ...]] = []
    frames: dict[str, list[np.ndarray]] = {"a": [], "b": []}
    while engine._songs:
        step = engine.step()
        seen.append(tuple(f"{name}{'' if frame is not None else ' ends'}" for name, frame in step.items()))
        for name, frame in step.items():
            if frame is not None:
                frames[name].append(frame)
    assert seen == [("a",), ("a", "b"), ("a", "b"), ("a ends", "b"), ("b ends",)]
    for made in frames.values():
        assert np.array_equal(np.stack(made, axis=1), alone)


def test_pending_frames_reach_only_the_song_they_were_made_for() -> None:
    """The song is dropped and begun again under its name, or continued by another engine from the last frame."""
    song = Song(prompt=prompt_of(DEMO), max_frames=12, topk=5, seed=3)
    alone = generate(ready(DEMO), song)
    engine = ahead(2)
    engine.admit("other", Song(prompt=prompt_of(DEMO), max_frames=90, topk=5, seed=9))
    engine.admit("song", song)
    made = [frame for frame in [engine.step().get("song") for _ in range(5)] if frame is not None]
    assert len(made) == 4
    engine.drop("song")  # the fifth is pending
    engine.admit("song", song, np.stack(made, axis=1))
    while len(made) < 12:
        if (frame := engine.step().get("song")) is not None:
            made.append(frame)
    assert np.array_equal(np.stack(made, axis=1), alone)


def test_a_song_that_is_dropped_leaves_nothing_to_a_frame_that_is_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache goes at once: room is made that way for the others."""
    caches: list[weakref.ref[KVCache]] = []
    empty = HeartMuLa.backbone_cache

    def record(model: HeartMuLa, rows: int, positions: int) -> KVCache:
        cache = empty(model, rows, positions)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(HeartMuLa, "backbone_cache", record)
    engine, song = ahead(2), Song(prompt=prompt_of(DEMO), max_frames=9, topk=5, seed=3)
    for name in ("stays", "goes"):
        engine.admit(name, song)
    engine.step()
    engine.drop("goes")
    assert [cache() is None for cache in caches] == [False, True]
    made = [frame for frame in (engine.step().get("stays") for _ in range(9)) if frame is not None]
    assert np.array_equal(np.stack(made, axis=1), generate(ready(DEMO), song))


@pytest.mark.parametrize("buckets", [False, True])
def test_a_frame_that_could_not_be_fetched_is_not_lost(buckets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for its codes is taken before it is made."""
    song = Song(prompt=prompt_of(DEMO), max_frames=8, topk=5, seed=3)
    engine = recording()[0] if buckets else ready(DEMO)
    engine.admit("song", song)
    made = [engine.step()["song"] for _ in range(3)]

    def full(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("no host memory can be page-locked")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(DeviceFull):
            engine.step()
    made += [engine.step()["song"] for _ in range(5)]
    assert np.array_equal(np.stack([f for f in made if f is not None], axis=1), generate(ready(DEMO), song))


def test_a_song_that_ended_has_no_frame_after_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    song = Song(prompt=prompt_of(TINY), max_frames=30, topk=5, seed=1)
    whole = generate(ready(TINY), song)
    engine = ready(TINY)
    engine._ahead = 1
    # The end token is one that the song has anyway, but for its first frames.
    end = int(whole[:, 5:].max())
    expected = next(t for t in range(30) if (whole[:, t] >= end).any())
    assert 0 < expected < 30
    monkeypatch.setattr(engine, "_checkpoint", with_end(end))
    engine.admit("song", song)
    made = []
    steps: list[bool] = []
    while "song" in engine._songs:
        step = engine.step()
        if "song" in step:
            steps.append(step["song"] is None)
            if step["song"] is not None:
                made.append(step["song"])
    assert steps == [False] * expected + [True]
    assert np.array_equal(np.stack(made, axis=1), whole[:, :expected])
    assert engine.step() == {}


def with_end(code: int) -> Checkpoint:
    """The tiny checkpoint with another end token."""
    return msgspec.structs.replace(TINY, gen=msgspec.structs.replace(TINY.gen, audio_eos_id=code))
