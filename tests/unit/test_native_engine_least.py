"""Songs that the model cannot end before a number of frames, however their frames are made."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.frames import BucketFrames
from services.tokenizer_worker.engines.native import NativeEngine
from tests.unit.native_engines import TINY, generate, one_thread, prompt_of, ready  # noqa: F401

# 4 codes of 69 end a song of this checkpoint: of eight codebooks one draws such a code every few frames.
SONG = Song(prompt=prompt_of(TINY), max_frames=16, topk=10**6)
SEEDS = range(6)


def on_cpu(slots: int = 1) -> NativeEngine:
    return ready(TINY, slots=slots)


def as_on_cuda(slots: int = 1) -> NativeEngine:
    engine = ready(TINY, slots=slots)
    engine._frames = BucketFrames(engine._model, TINY.gen.audio_eos_id, None)
    return engine


WAYS = pytest.mark.parametrize("new", [on_cpu, as_on_cuda])


@WAYS
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_a_song_goes_on_where_it_would_have_ended(cfg_scale: float, new: Callable[[], NativeEngine]) -> None:
    """Up to there nothing changes, and once it has its least length it may end again."""
    engine, ended, further = new(), [], []
    for seed in SEEDS:
        song = replace(SONG, seed=seed, cfg_scale=cfg_scale)
        short, long = generate(engine, song), generate(engine, replace(song, min_frames=8))
        assert 8 <= long.shape[1] <= 16
        assert (long < TINY.gen.audio_eos_id).all()
        same = min(short.shape[1], 8)
        assert np.array_equal(long[:, :same], short[:, :same])
        if short.shape[1] >= 8:
            assert np.array_equal(long, short), "it never was too short"
        ended.append(short.shape[1])
        further.append(long.shape[1])
    assert min(ended) < 8, "no song was too short"
    assert min(further) < 16, "no song ended by itself afterwards"


@WAYS
def test_no_song_ends_where_its_least_length_is_its_longest(new: Callable[[], NativeEngine]) -> None:
    engine = new()
    for seed in SEEDS:
        assert generate(engine, replace(SONG, seed=seed, min_frames=16)).shape == (8, 16)


@WAYS
def test_each_song_of_a_batch_has_a_least_length_of_its_own(new: Callable[..., NativeEngine]) -> None:
    songs = {str(least): replace(SONG, seed=2, min_frames=least) for least in (0, 5, 16)}
    alone = {name: generate(on_cpu(), song) for name, song in songs.items()}
    assert len({frames.shape[1] for frames in alone.values()}) > 1
    engine = new(slots=3)
    made: dict[str, list[np.ndarray]] = {name: [] for name in songs}
    for name, song in songs.items():
        engine.admit(name, song)
    while frames := engine.step():
        for name, frame in frames.items():
            if frame is not None:
                made[name].append(frame)
    for name in songs:
        assert np.array_equal(np.stack(made[name], axis=1), alone[name]), name


@WAYS
def test_an_interrupted_song_keeps_its_least_length(new: Callable[[], NativeEngine]) -> None:
    song = replace(SONG, seed=2, min_frames=8)
    engine = new()
    whole = generate(engine, song)
    for made in (0, 1, 7, 8, 9):
        assert np.array_equal(generate(engine, song, whole[:, :made]), whole[:, made:]), made
