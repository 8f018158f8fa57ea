"""The adapter to the reference. Every test but the first needs heartlib: `make test-reference` brings it."""

import contextlib
import sys
import types

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


def test_codes_that_end_a_song_are_kept_from_the_reference(
    golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only while it is asked for, whatever happens meanwhile."""
    reference = types.ModuleType("heartlib.heartmula.modeling_heartmula")
    reference.sample_topk = lambda logits, topk, temperature: logits.argmax(-1, keepdim=True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "heartlib", types.ModuleType("heartlib"))
    monkeypatch.setitem(sys.modules, "heartlib.heartmula", types.ModuleType("heartlib.heartmula"))
    monkeypatch.setitem(sys.modules, "heartlib.heartmula.modeling_heartmula", reference)
    engine, end = HeartlibEngine(golden_checkpoint, "cpu", "float32"), golden_checkpoint.gen.audio_eos_id
    logits = torch.arange(float(golden_checkpoint.lm.audio_vocab_size)).repeat(2, 1)  # the last ones are the largest
    for _ in range(2):
        drawn = []
        with contextlib.suppress(DeviceFull), engine._without_end():
            drawn = reference.sample_topk(logits, 5, 1.0).tolist()
            raise DeviceFull
        assert drawn == [[end - 1]] * 2
        assert reference.sample_topk(logits, 5, 1.0).tolist() == [[logits.shape[1] - 1]] * 2


def generate(engine: TokenEngine, song: Song, made: np.ndarray | None = None) -> np.ndarray:
    """All frames of a song from those on that were made, ``[T, codebooks]``."""
    engine.admit("song", song, made)
    frames = []
    while (frame := engine.step()["song"]) is not None:
        frames.append(frame)
    return np.stack(frames) if frames else np.zeros((0, 8), np.int16)


class CountedNoise:
    """The reference's draw of one code a row, with the noise of the native engine instead of a generator's.

    Noise of frame n is made by SplitMix64, started at output n of SplitMix64 that was started at the song's seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._draws = seed, 0

    def __call__(self, probabilities: torch.Tensor) -> torch.Tensor:
        frame, codebook = divmod(self._draws, 8)
        self._draws += 1
        width = probabilities.shape[-1]
        started = splitmix64(np.array([self._seed], np.uint64), np.array([frame + 1], np.uint64))
        bits = splitmix64(started, np.arange(codebook * width + 1, (codebook + 1) * width + 1, dtype=np.uint64))
        uniform = torch.from_numpy((bits >> np.uint64(41)).astype(np.float32) + np.float32(0.5)) * 2**-23
        return (probabilities / -uniform.log()).argmax(-1, keepdim=True).int()


def splitmix64(started: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Outputs of the generator of Steele, Lea & Flood (2014) by their number, counted from 1; all are uint64."""
    z = started + outputs * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def test_same_songs_as_the_native_engine(golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, and sampled with the same noise; unlike heartlib, the adapter can change the rows between songs."""
    pytest.importorskip("heartlib")
    prompt = Prompter(golden_checkpoint).encode("Piano,Happy", "[Verse]\nHello World")
    heartlib = HeartlibEngine(golden_checkpoint, "cpu", "float32")
    native = NativeEngine(golden_checkpoint, "cpu", "float32")
    engines: list[TokenEngine] = [heartlib, native]
    for engine in engines:
        engine.load()
        engine.to_device()
    lengths = []
    greedy, sampled = [(0, 0.0, 1.0), (0, 0.0, 1.5)], [(seed, 1.0, scale) for seed in range(20) for scale in (1.0, 3.0)]
    for seed, temperature, cfg_scale in greedy + sampled:
        song = Song(prompt=prompt, max_frames=20, temperature=temperature, cfg_scale=cfg_scale, seed=seed)
        monkeypatch.setattr(heartlib._reference, "_multinomial_sample_one_no_sync", CountedNoise(seed))
        theirs, ours = (generate(engine, song) for engine in engines)
        assert np.array_equal(ours, theirs)
        lengths.append(len(ours))
    assert sum(lengths) > 300  # 4 codes of 69 end a song
    endless = [
        Song(prompt=prompt, max_frames=20, min_frames=least, cfg_scale=3.0, seed=seed)
        for seed in range(4)
        for least in (9, 20)
    ]
    for song in endless:
        monkeypatch.setattr(heartlib._reference, "_multinomial_sample_one_no_sync", CountedNoise(song.seed))
        theirs, ours = (generate(engine, song) for engine in engines)
        assert np.array_equal(ours, theirs)
        assert len(ours) >= song.min_frames
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
