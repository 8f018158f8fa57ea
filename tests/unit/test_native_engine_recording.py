"""Frames that are recorded and played again, frames pending between two steps, frames as one compiled function.

On CUDA the recorder is a CUDA graph. Here it is a trace of every operation, which plays the same operations on the same
tensors: whatever the host had decided while it was recorded, it would decide again.
"""

import logging

import msgspec
import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from services.tokenizer_worker.cuda_graph import Recording, Work
from services.tokenizer_worker.engines import native
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from shared.errors import DeviceFull
from shared.model.checkpoint import Checkpoint
from tests.unit.native_engines import DEMO, TINY, generate, one_thread, prompt_of, ready  # noqa: F401
from tests.unit.test_native_engine_batch import mingle, songs


class Tracer:
    """A recorder on the CPU, for one engine."""

    def __init__(self, engine: NativeEngine) -> None:
        self.engine = engine
        self.recorded = self.played = 0

    def __call__(self, work: Work) -> Work:
        batch = self.engine._batch
        assert batch is not None
        changing = [batch.positions, batch.counters, batch.embedded]
        before = [tensor.clone() for tensor in changing]
        graph = make_fx(work)()  # does the work as well, which a CUDA graph does not
        for tensor, value in zip(changing, before, strict=True):
            tensor.copy_(value)
        self.recorded += 1

        def play() -> None:
            self.played += 1
            graph()

        return play


def recording(slots: int = 1) -> tuple[NativeEngine, Tracer]:
    engine = ready(DEMO, slots=slots)
    tracer = Tracer(engine)
    engine._recording = Recording(tracer)
    return engine, tracer


@pytest.fixture(autouse=True)
def _possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recording, "possible", True)
    monkeypatch.setattr(Recording, "announced", False)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_a_recorded_frame_is_the_next_one_every_time_it_is_played(
    cfg_scale: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_EXTENT", 32)
    song = Song(prompt=prompt_of(DEMO), max_frames=40, topk=5, seed=3, cfg_scale=cfg_scale)
    alone = generate(ready(DEMO), song)
    engine, tracer = recording()
    with caplog.at_level(logging.INFO):
        assert np.array_equal(generate(engine, song), alone)
    assert 2 <= tracer.recorded <= 3  # one for each 32 positions
    assert tracer.played > 25
    assert len([r for r in caplog.records if "recorded as a CUDA graph in" in r.message]) == 1


def test_recordings_follow_the_songs_that_join_and_leave() -> None:
    batch = songs()
    engine, tracer = recording(slots=3)
    together = mingle(engine, batch)
    for name, song in batch.items():
        assert np.array_equal(together[name], generate(ready(DEMO), song)), name
    assert tracer.recorded >= 3
    assert tracer.played >= 8


def test_where_frames_cannot_be_recorded_they_are_made_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(work: Work) -> Work:
        raise RuntimeError("not permitted when stream is capturing")

    song = Song(prompt=prompt_of(DEMO), max_frames=8, topk=5, seed=3)
    alone = generate(ready(DEMO), song)
    for _ in range(2):
        engine = ready(DEMO)
        engine._recording = Recording(refuse)
        with caplog.at_level(logging.WARNING):
            assert np.array_equal(generate(engine, song), alone)
    (warning,) = [r for r in caplog.records if "cannot be recorded" in r.message]
    assert "not permitted when stream is capturing" in warning.message


def test_a_device_that_is_full_while_recording_costs_no_song_a_frame() -> None:
    engine, tracer = recording()
    song = Song(prompt=prompt_of(DEMO), max_frames=8, topk=5, seed=3)
    refusals = [torch.OutOfMemoryError("1 GiB")]

    def refuse_once(work: Work) -> Work:
        if refusals:
            raise refusals.pop()
        return tracer(work)

    engine._recording = Recording(refuse_once)
    engine.admit("song", song)
    frames: list[np.ndarray | None] = []
    failed = 0
    while len(frames) < 8:
        try:
            frames.append(engine.step()["song"])
        except DeviceFull:
            failed += 1
    assert failed == 1
    assert np.array_equal(np.stack([f for f in frames if f is not None], axis=1), generate(ready(DEMO), song))


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


def test_a_frame_compiles_as_one_function() -> None:
    """With `fullgraph` nothing in a frame waits for the host; the songs are the same."""
    engine, song = ready(TINY), Song(prompt=prompt_of(TINY), max_frames=10, topk=5, seed=3)
    alone = generate(ready(TINY), song)
    torch.compiler.reset()
    engine._next_frame = torch.compile(engine._model.next_frame, backend="aot_eager", fullgraph=True)
    assert np.array_equal(generate(engine, song), alone)
