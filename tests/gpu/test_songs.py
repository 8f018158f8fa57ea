"""Songs are the same however they are made: as graphs or not, alone or with others, at once or in turns."""

import itertools
import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from services.tokenizer_worker.cuda_graph import Recording
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import frame as frames_of_songs
from shared.model.checkpoint import Checkpoint
from tests.bench.gpu_device import captures
from tests.gpu.conftest import DEMO
from tests.gpu.engines import Way, advance, generate, prompt_of, ready, songs_of, stacked, take

FRAMES = 16
WAYS: tuple[Way, ...] = ("graphs", "kernels", "loop")


def mingle(engine: NativeEngine, songs: dict[str, Song]) -> dict[str, np.ndarray]:
    """Make songs that join one by one, two frames apart, while those before them go on and end."""
    made: dict[str, list[np.ndarray]] = {name: [] for name in songs}
    for name, song in songs.items():
        engine.admit(name, song)
        advance(engine, made, 2)
    advance(engine, made)
    return {name: stacked(frames) for name, frames in made.items()}


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, frames in wanted.items():
        assert np.array_equal(got[name], frames), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graphs_give_the_frames_of_the_same_kernels_without_graphs(device: str, dtype: str) -> None:
    """Token for token, while songs join and leave: a graph is the same kernels in the same order."""
    songs = songs_of(DEMO, FRAMES)
    with captures() as graphs:
        recorded = mingle(ready(DEMO, device, dtype, len(songs), "graphs"), songs)
    assert_same(recorded, mingle(ready(DEMO, device, dtype, len(songs), "kernels"), songs))
    if device != "cpu":
        assert len(graphs.ms) == 4, "one graph for each of the buckets 1, 2, 4 and 8"


def test_kernels_give_the_frames_of_plain_pytorch(device: str) -> None:
    """In float32, where sums in another order change no choice."""
    songs = songs_of(DEMO, FRAMES)
    plain = mingle(ready(DEMO, device, slots=len(songs), way="loop"), songs)
    assert_same(mingle(ready(DEMO, device, slots=len(songs), way="graphs"), songs), plain)


def test_songs_do_not_depend_on_the_others(device: str) -> None:
    songs = songs_of(DEMO, FRAMES)
    alone = {name: generate(ready(DEMO, device, way="graphs"), song) for name, song in songs.items()}
    for order in itertools.islice(itertools.permutations(songs), 40, 120, 30 if device != "cpu" else 80):
        together = mingle(ready(DEMO, device, slots=len(songs), way="graphs"), {name: songs[name] for name in order})
        assert_same(together, alone)


@pytest.mark.gpu
def test_forty_songs_at_once_are_those_that_each_is_alone() -> None:
    """Through every bucket to beyond the largest, up and down."""
    lengths = {f"song {n}": Song(prompt=prompt_of(8 + n % 9), max_frames=60 - n, topk=5, seed=n) for n in range(40)}
    engine = ready(DEMO, "cuda:0", slots=40)
    made: dict[str, list[np.ndarray]] = {name: [] for name in lengths}
    with captures() as graphs:
        for name, song in lengths.items():
            engine.admit(name, song)
            advance(engine, made, 1)
        advance(engine, made)
    assert len(graphs.ms) <= 7, "one for each bucket"
    for name in ("song 0", "song 17", "song 39"):
        assert np.array_equal(stacked(made[name]), generate(ready(DEMO, "cuda:0"), lengths[name])), name


def test_songs_go_on_as_if_never_interrupted(device: str, golden_checkpoint: Checkpoint) -> None:
    for checkpoint in (golden_checkpoint, DEMO) if device != "cpu" else (golden_checkpoint,):
        for name, song in songs_of(checkpoint, FRAMES).items():
            engine = ready(checkpoint, device, way="graphs")
            whole = generate(engine, song)
            for made in (0, 1, 7, whole.shape[1] - 1, whole.shape[1]):
                rest = generate(engine, song, whole[:, :made])
                assert np.array_equal(rest, whole[:, made:]), (name, made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parked_songs_go_on_as_if_never_interrupted(device: str, dtype: str) -> None:
    """Also in bfloat16, in the same company: their caches come back to the bit, and the weights move meanwhile."""
    songs = songs_of(DEMO, FRAMES)
    engine = ready(DEMO, device, dtype, len(songs), "graphs")
    made: dict[str, list[np.ndarray]] = {name: [] for name in songs}
    for name, song in songs.items():
        engine.admit(name, song)
    advance(engine, made)
    whole = {name: stacked(frames) for name, frames in made.items()}
    for turn in (1, 6):
        made = {name: [] for name in songs}
        for name, song in songs.items():
            engine.admit(name, song)
        advance(engine, made, turn)
        going = list(engine._songs)
        assert len(going) > 1
        for name in going:
            engine.park(name, stacked(made[name]))
            assert name in engine._parked
        engine.to_host()
        engine.to_device()
        for name in going:
            engine.admit(name, songs[name], stacked(made[name]))
        advance(engine, made)
        assert_same({name: stacked(frames) for name, frames in made.items()}, whole)


def test_a_frame_that_cannot_be_recorded_is_made_all_the_same(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, say: Callable[..., None]
) -> None:
    """A call that is illegal while a graph is captured: CUDA refuses it by code, and the device stays sound."""
    song = songs_of(DEMO, FRAMES)["song 1"]
    alone = generate(ready(DEMO, device, way="graphs"), song)
    original = frames_of_songs.advance

    def synchronizing(*arguments: object) -> Tensor:
        if device != "cpu":
            torch.cuda.synchronize()
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Recording, "possible", True)
    monkeypatch.setattr(frames_of_songs, "advance", synchronizing)
    with caplog.at_level(logging.WARNING):
        for way in ("graphs", "graphs"):
            assert np.array_equal(generate(ready(DEMO, device, way=way), song), alone)
    warnings = [record.message for record in caplog.records if "cannot be recorded" in record.message]
    if device == "cpu":
        assert warnings == []
    else:
        say(warning=warnings)
        assert len(warnings) == 1
        assert not Recording.possible
    monkeypatch.setattr(frames_of_songs, "advance", original)
    monkeypatch.setattr(Recording, "possible", True)
    with captures() as graphs:
        assert np.array_equal(generate(ready(DEMO, device, way="graphs"), song), alone)
    assert len(graphs.ms) == (0 if device == "cpu" else 1), "the device is not as it was"


@pytest.mark.parametrize("int8", [("decoder",), ("backbone", "decoder")], ids=["decoder", "all"])
def test_int8_kernels_give_the_frames_of_plain_pytorch(device: str, int8: tuple[str, ...]) -> None:
    """With float32 activations, where sums in another order change no choice."""
    song = songs_of(DEMO, FRAMES)["song 1"]
    engine = NativeEngine(DEMO, device, "float32", int8=int8)
    engine.load()
    engine.to_device()
    found = []
    for way in WAYS:
        take(engine, way)
        found.append(generate(engine, song))
    assert found[0].shape[1] > 0
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
