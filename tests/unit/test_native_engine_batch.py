"""Several songs in one engine, and what happens to the others when one of them finds the device full."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from services.tokenizer_worker.__main__ import build_engine
from services.tokenizer_worker.engines.base import Song, TokenEngine
from services.tokenizer_worker.engines.trivial import TrivialEngine
from services.tokenizer_worker.model import HeartMuLa, Sampler
from shared.errors import DeviceFull
from shared.settings import Settings
from tests.unit.native_engines import DEMO, generate, one_thread, prompt_of, ready  # noqa: F401


def songs() -> dict[str, Song]:
    """Create songs that differ in everything that could leak from one to another."""
    prompt = prompt_of(DEMO)
    short = replace(prompt, lyrics=prompt.lyrics[:2])
    return {
        "a": Song(prompt=prompt, max_frames=14, topk=5, seed=1),
        "b": Song(prompt=short, max_frames=9, topk=50, seed=2, cfg_scale=1, temperature=1.3),
        "c": Song(prompt=short, max_frames=11, temperature=0, cfg_scale=3),
        "d": Song(prompt=prompt, max_frames=12, topk=5, seed=1, cfg_scale=0.5),
    }


def mingle(engine: TokenEngine, batch: dict[str, Song]) -> dict[str, np.ndarray]:
    """Songs join and leave in the middle of others: "a" begins, "b" and "c" join, "b" is dropped for "d", and goes on
    when "c" has ended. All frames of each, int16 ``[8, T]``."""
    frames: dict[str, list[np.ndarray]] = {name: [] for name in batch}

    def steps(count: int) -> None:
        for _ in range(count):
            for name, frame in engine.step().items():
                if frame is not None:
                    frames[name].append(frame)

    engine.admit("a", batch["a"])
    steps(3)
    engine.admit("b", batch["b"])
    engine.admit("c", batch["c"])
    steps(4)
    engine.drop("b")
    engine.admit("d", batch["d"])
    steps(8)
    assert len(frames["c"]) == 11
    engine.admit("b", batch["b"], np.stack(frames["b"], axis=1))
    steps(12)
    assert engine.step() == {}
    return {name: np.stack(made, axis=1) for name, made in frames.items()}


def test_frames_do_not_depend_on_the_others_in_the_batch() -> None:
    batch = songs()
    alone = {name: generate(ready(DEMO), song) for name, song in batch.items()}
    together = mingle(ready(DEMO, slots=3), batch)
    for name, song in batch.items():
        assert alone[name].shape == (8, song.max_frames)
        assert np.array_equal(together[name], alone[name]), name


def test_the_trivial_engine_takes_several_songs_as_well() -> None:
    batch = songs()
    together = mingle(TrivialEngine(0, 3), batch)
    for name, song in batch.items():
        assert np.array_equal(together[name], generate(TrivialEngine(0), song)), name


def test_there_are_as_many_slots_as_asked_for() -> None:
    song = Song(prompt=prompt_of(DEMO), max_frames=2)
    engines: list[TokenEngine] = [ready(DEMO, slots=2), TrivialEngine(0, 2)]
    for engine in engines:
        assert engine.slots == 2
        engine.admit("a", song)
        with pytest.raises(ValueError, match="no slot for song a: a of 2"):
            engine.admit("a", song)
        engine.admit("b", song)
        with pytest.raises(ValueError, match="no slot for song c: a, b of 2"):
            engine.admit("c", song)
        assert set(engine.step()) == {"a", "b"}


@pytest.mark.parametrize("name", ["native", "trivial"])
def test_the_setting_chooses_the_number_of_slots(name: str) -> None:
    engine, _, _ = build_engine(Settings(engine=name, device="cpu", batch=5), DEMO)
    assert engine.slots == 5


def full_at(place: type, name: str, call: int) -> Callable[..., Tensor]:
    """Replace a method by one that finds the device full at the `call`-th call."""
    calls, method = itertools.count(), getattr(place, name)

    def full(*arguments: Any) -> Tensor:
        if next(calls) == call:
            raise torch.OutOfMemoryError
        made: Tensor = method(*arguments)
        return made

    return full


@pytest.mark.parametrize(
    ("place", "name", "call"),
    [(HeartMuLa, "step", 0), (HeartMuLa, "frame", 0), (Sampler, "draw", 5), (HeartMuLa, "embed_frames", 0)],
)
def test_a_device_that_is_full_costs_no_song_a_frame(
    place: type, name: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every song's next frame is unchanged, wherever in the step memory ran out."""
    batch = {name: song for name, song in songs().items() if name != "d"}
    alone = {song_id: generate(ready(DEMO), song) for song_id, song in batch.items()}
    engine = ready(DEMO, slots=3)
    for song_id, song in batch.items():
        engine.admit(song_id, song)
    for index in range(9):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full_at(place, name, call))
            with pytest.raises(DeviceFull):
                engine.step()
        made = engine.step()
        for song_id in batch:
            assert np.array_equal(made[song_id], alone[song_id][:, index]), song_id  # type: ignore[arg-type]


def test_a_device_that_is_full_leaves_an_ended_song_to_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, song = ready(DEMO, slots=2), Song(prompt=prompt_of(DEMO), max_frames=1, temperature=0)
    engine.admit("ended", song)
    engine.step()
    engine.admit("begun", song)
    with monkeypatch.context() as patch:
        patch.setattr(HeartMuLa, "frame", full_at(HeartMuLa, "frame", 0))
        with pytest.raises(DeviceFull):
            engine.step()
    made = engine.step()
    assert made["ended"] is None
    assert made["begun"] is not None


def test_a_step_of_the_trivial_engine_pauses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    engine = TrivialEngine(40, 3)
    for name in "abc":
        engine.admit(name, Song(prompt=prompt_of(DEMO), max_frames=5))
    engine.step()
    assert pauses == [0.04]


@pytest.mark.parametrize("seed", [0, 666, 2**53 - 1])
def test_the_trivial_engine_accepts_every_seed(seed: int) -> None:
    engine = TrivialEngine(0, 1)
    engine.admit("song", Song(prompt=prompt_of(DEMO), max_frames=5, seed=seed))
    assert list(engine.step()) == ["song"]
