"""Songs that begin alike, as variants do: their prompt and first frames are computed once."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from services.tokenizer_worker.engines import native, parked
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.frames import BucketFrames
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import HeartMuLa, KVCache
from shared.model.checkpoint import Checkpoint
from tests.unit.native_engines import DEMO, TINY, generate, one_thread, prompt_of, ready  # noqa: F401
from tests.unit.test_native_engine_parking import NOTHING, Frames, steps

CHECKPOINTS = pytest.mark.parametrize("checkpoint", [TINY, DEMO], ids=["tiny", "demo"])


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """How many positions were prefilled so far: with guidance, those of both rows together once."""
    found, advance = SimpleNamespace(positions=0), HeartMuLa.advance

    def count(model: HeartMuLa, embedded: Tensor, cache: KVCache, start: int) -> Tensor:
        found.positions += embedded.shape[1]
        return advance(model, embedded, cache, start)

    monkeypatch.setattr(HeartMuLa, "advance", count)
    return found


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "spare_bytes", lambda: 2**30)


def variants(checkpoint: Checkpoint, frames: int, count: int = 4) -> tuple[dict[str, Song], np.ndarray]:
    """Songs that differ in all but prompt and guidance's rows, and the frames that all of them begin with."""
    song = Song(prompt=prompt_of(checkpoint), max_frames=frames + 9, topk=5, seed=1)
    kept = generate(ready(checkpoint), replace(song, max_frames=max(1, frames)))[:, :frames]
    assert kept.shape == (8, frames)
    songs = {
        "a": song,
        "b": replace(song, seed=2, max_frames=frames + 7, min_frames=frames + 2),
        "c": replace(song, seed=3, temperature=1.3, topk=20, cfg_scale=3.0),
        "d": replace(song, temperature=0),
    }
    return dict(list(songs.items())[:count]), kept


def all_steps(engine: NativeEngine, made: Frames) -> Frames:
    """Step until every song has ended."""
    while frames := engine.step():
        for name, frame in frames.items():
            if frame is not None:
                made[name] = np.column_stack((made[name], frame))
    return made


def as_on_cuda(checkpoint: Checkpoint, slots: int) -> NativeEngine:
    engine = ready(checkpoint, slots=slots)
    engine._frames = BucketFrames(engine._model, checkpoint.gen.audio_eos_id, None)
    return engine


def on_cpu(checkpoint: Checkpoint, slots: int) -> NativeEngine:
    return ready(checkpoint, slots=slots)


@CHECKPOINTS
@pytest.mark.parametrize("frames", [0, 1, 20])
@pytest.mark.parametrize("new", [on_cpu, as_on_cuda])
def test_variants_are_prefilled_once_and_are_the_songs_that_they_are_alone(
    new: Callable[[Checkpoint, int], NativeEngine], frames: int, checkpoint: Checkpoint, computed: SimpleNamespace
) -> None:
    songs, kept = variants(checkpoint, frames)
    alone = {name: generate(ready(checkpoint), song, kept) for name, song in songs.items()}
    engine = new(checkpoint, 4)
    computed.positions = 0
    for name, song in songs.items():
        engine.admit(name, song, kept)
        assert computed.positions == song.prompt.length - 1 + frames, name
    made = all_steps(engine, dict.fromkeys(songs, NOTHING))
    for name in songs:
        assert np.array_equal(made[name], alone[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_is_what_prefilling_leaves_to_the_bit(dtype: str) -> None:
    """Also of a song that has got further meanwhile, and into caches of other lengths."""
    songs, kept = variants(DEMO, 20)
    engine, made = ready(DEMO, dtype, slots=4), dict.fromkeys(songs, NOTHING)
    for name, song in songs.items():
        engine.admit(name, song, kept)
        assert_prefilled(engine, name, song, kept)
        steps(engine, made, 2)


def assert_prefilled(engine: NativeEngine, name: str, song: Song, kept: np.ndarray) -> None:
    """Check that a song's cache is, to the bit, the one that another engine computes."""
    other = ready(DEMO, str(engine._dtype).removeprefix("torch."))
    other.admit(name, song, kept)
    found, expected = (one._songs[name].cache for one in (engine, other))
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("positions", [3, 64])
def test_a_parked_song_serves_as_well(
    positions: int, computed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parked, "_POSITIONS", positions)  # one chunk, or several with the last in part
    songs, kept = variants(DEMO, 20, 3)
    alone = {name: generate(ready(DEMO), song, kept) for name, song in songs.items()}
    engine, made = ready(DEMO, slots=1), {"a": kept}
    engine.admit("a", songs["a"], kept)
    steps(engine, made, 5)
    engine.park("a", made["a"])
    engine.admit("b", songs["b"], kept)
    assert_prefilled(engine, "b", songs["b"], kept)
    engine.drop("b")
    computed.positions = 0
    for name in "bc":
        assert np.array_equal(generate(engine, songs[name], kept), alone[name]), name
    engine.admit("a", songs["a"], made["a"])
    all_steps(engine, made)
    assert np.array_equal(made["a"][:, 20:], alone["a"])
    assert computed.positions == 0


def test_a_song_that_came_back_serves_with_what_it_began_with(computed: SimpleNamespace) -> None:
    songs, kept = variants(DEMO, 20, 2)
    alone = generate(ready(DEMO), songs["b"], kept)
    engine, made = ready(DEMO, slots=2), {"a": kept, "b": NOTHING}
    engine.admit("a", songs["a"], kept)
    steps(engine, made, 5)
    engine.park("a", made["a"])
    engine.admit("a", songs["a"], made["a"])
    computed.positions = 0
    engine.admit("b", songs["b"], kept)
    assert computed.positions == 0
    assert np.array_equal(all_steps(engine, made)["b"], alone)


@pytest.mark.parametrize("difference", ["prompt", "rows", "a code", "fewer", "more"])
def test_songs_that_begin_otherwise_are_prefilled(difference: str, computed: SimpleNamespace) -> None:
    songs, kept = variants(DEMO, 20, 2)
    song, frames = songs["b"], kept
    engine, made = ready(DEMO, slots=2), {"a": kept, "b": NOTHING}
    engine.admit("a", songs["a"], kept)
    steps(engine, made, 2)
    if difference == "prompt":
        song = replace(song, prompt=replace(song.prompt, lyrics=song.prompt.lyrics[::-1]))
    elif difference == "rows":
        song = replace(song, cfg_scale=1.0)
    elif difference == "a code":
        frames = kept.copy()
        frames[7, 3] ^= 1
    else:  # what the first song has by now is not what it began with
        frames = kept[:, :19] if difference == "fewer" else made["a"]
    alone = generate(ready(DEMO), song, frames)
    computed.positions = 0
    engine.admit("b", song, frames)
    assert computed.positions == song.prompt.length - 1 + frames.shape[1]
    assert np.array_equal(all_steps(engine, made)["b"], alone)
