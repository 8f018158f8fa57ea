"""The adapter to the reference. Every test but the first needs heartlib."""

import sys

import numpy as np
import pytest
import torch

from services.tokenizer_worker.engines.base import Song, TokenEngine
from services.tokenizer_worker.engines.heartlib import HeartlibEngine
from services.tokenizer_worker.engines.native import NativeEngine
from shared.errors import ConfigError, DeviceFull, SongError
from shared.model.checkpoint import Checkpoint
from shared.model.prompt import Prompter


def test_a_missing_heartlib_is_reported(golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("heartlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "heartlib", None)
    with pytest.raises(ConfigError, match=r"HEARTMULA_ENGINE=heartlib needs heartlib"):
        HeartlibEngine(golden_checkpoint, "cpu", "float32")


def generate(engine: TokenEngine, song: Song, made: np.ndarray | None = None) -> np.ndarray:
    """All frames of a song from those on that were made, ``[T, codebooks]``."""
    engine.admit("song", song, made)
    frames = []
    while (frame := engine.step()["song"]) is not None:
        frames.append(frame)
    return np.stack(frames) if frames else np.zeros((0, 8), np.int16)


def test_same_songs_as_the_native_engine(golden_checkpoint: Checkpoint) -> None:
    """Greedy and sampled, with and without guidance; unlike heartlib, the adapter can change the rows between songs."""
    pytest.importorskip("heartlib")
    prompt = Prompter(golden_checkpoint).encode("Piano,Happy", "[Verse]\nHello World")
    heartlib = HeartlibEngine(golden_checkpoint, "cpu", "float32")
    native = NativeEngine(golden_checkpoint, "cpu", "float32")
    engines: list[TokenEngine] = [heartlib, native]
    for engine in engines:
        engine.load()
        engine.to_device()
    for temperature, cfg_scale in [(0, 1.0), (0, 1.5), (1.0, 1.0), (1.0, 3.0)]:
        song = Song(prompt=prompt, max_frames=20, temperature=temperature, cfg_scale=cfg_scale, seed=7)
        theirs, ours = (generate(engine, song) for engine in engines)
        assert len(ours) > 0
        assert np.array_equal(ours, theirs)
    with pytest.raises(SongError, match="guidance"):
        heartlib.admit("song", Song(prompt=prompt, max_frames=5, cfg_scale=0.5))


def test_a_song_goes_on_where_it_was_interrupted(
    golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("heartlib")
    prompt = Prompter(golden_checkpoint).encode("Piano,Happy", "[Verse]\nHello World")
    engine = HeartlibEngine(golden_checkpoint, "cpu", "float32")
    engine.load()
    engine.to_device()
    for temperature, cfg_scale in [(0, 1.0), (1.0, 1.5)]:
        song = Song(prompt=prompt, max_frames=12, temperature=temperature, cfg_scale=cfg_scale, seed=7)
        whole = generate(engine, song)
        for made in (0, 1, 5, 11, 12):
            assert np.array_equal(generate(engine, song, whole[:made].T), whole[made:])

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    engine.admit("song", song, whole[:4].T)
    for frame in whole[4:8]:
        with monkeypatch.context() as patch:  # the backbone has fed its caches by then
            patch.setattr(engine._model, "_embed_audio", full)
            with pytest.raises(DeviceFull):
                engine.step()
        assert np.array_equal(engine.step()["song"], frame)  # type: ignore[arg-type]
