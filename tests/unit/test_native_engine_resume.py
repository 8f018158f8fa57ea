"""Songs that go on after an interruption, in an engine that has never seen them."""

import weakref
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from services.tokenizer_worker.engines import prefill
from services.tokenizer_worker.engines.base import Song, TokenEngine
from services.tokenizer_worker.engines.trivial import TrivialEngine
from services.tokenizer_worker.model import HeartMuLa, KVCache, load_weights
from shared.errors import DeviceFull, SongError
from shared.model.checkpoint import Checkpoint
from tests.unit.native_engines import DEMO, TINY, generate, one_thread, prompt_of, ready  # noqa: F401

CHECKPOINTS = pytest.mark.parametrize("checkpoint", [TINY, DEMO], ids=["tiny", "demo"])


@CHECKPOINTS
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5, 0.5])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_song_goes_on_as_if_never_interrupted(temperature: float, cfg_scale: float, checkpoint: Checkpoint) -> None:
    song = Song(
        prompt=prompt_of(checkpoint), max_frames=28, temperature=temperature, topk=5, cfg_scale=cfg_scale, seed=3
    )
    whole = generate(ready(checkpoint), song)
    last = whole.shape[1]
    assert last > 20
    for made in (0, 1, 2, 19, last - 1, last):
        rest = generate(ready(checkpoint), song, whole[:, :made])
        assert np.array_equal(rest, whole[:, made:]), made


@CHECKPOINTS
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_song_may_be_interrupted_again_and_again(temperature: float, checkpoint: Checkpoint) -> None:
    song = Song(prompt=prompt_of(checkpoint), max_frames=30, temperature=temperature, topk=5, seed=4)
    whole = generate(ready(checkpoint), song)
    made = np.zeros((8, 0), np.int16)
    for turn in (1, 1, 7, 2, 30):
        engine = ready(checkpoint)
        engine.admit("song", song, made)
        for _ in range(turn):
            frame = engine.step()["song"]
            if frame is None:
                break
            made = np.column_stack((made, frame))
    assert np.array_equal(made, whole)


@CHECKPOINTS
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_a_song_that_goes_on_at_its_end_is_the_one_that_was_asked_for_longer(
    cfg_scale: float, checkpoint: Checkpoint
) -> None:
    """Where the original met its limit of length: alone, and beside variants that began with the same frames."""
    song = Song(prompt=prompt_of(checkpoint), max_frames=20, temperature=1.3, topk=20, cfg_scale=cfg_scale, seed=3)
    original = generate(ready(checkpoint), song)
    assert original.shape == (8, 20)
    longer = [replace(song, max_frames=36, min_frames=20, seed=seed) for seed in (3, 4, 5)]
    whole = generate(ready(checkpoint), replace(song, max_frames=36))
    assert whole.shape[1] > 20
    assert np.array_equal(np.column_stack((original, generate(ready(checkpoint), longer[0], original))), whole)
    engine = ready(checkpoint, slots=3)
    made = {str(variant.seed): original for variant in longer}
    for variant in longer:
        engine.admit(str(variant.seed), variant, original)
    while frames := engine.step():
        for name, frame in frames.items():
            if frame is not None:
                made[name] = np.column_stack((made[name], frame))
    assert np.array_equal(made["3"], whole)
    if checkpoint is TINY:  # the demo is sure of what follows
        assert not np.array_equal(made["4"], whole)


def test_a_long_prompt_and_many_frames_are_prefilled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    song = Song(prompt=prompt_of(DEMO), max_frames=30, topk=5, seed=4)
    whole = generate(ready(DEMO), song)
    monkeypatch.setattr(prefill, "_PREFILL", 4)
    assert song.prompt.length % 4 != 0
    assert np.array_equal(generate(ready(DEMO), song), whole)
    for made in (4, 5, 6, 21):
        assert np.array_equal(generate(ready(DEMO), song, whole[:, :made]), whole[:, made:]), made


@torch.inference_mode()
def test_prefilling_equals_stepping() -> None:
    """Hidden states and caches are equal too, for any codes, where equal frames would not show a difference."""
    model, prompt = HeartMuLa(TINY.lm, torch.float32), prompt_of(TINY)
    load_weights(model, TINY.lm_path)
    codes = torch.arange(6 * 8).view(6, 8)
    embedded = [model.embed_prompt(prompt.tags, prompt.lyrics, 2), model.embed_frames(codes).expand(2, -1, -1)]
    whole = torch.cat(embedded, dim=1)  # [2, P + 6, D]

    def advance(*sizes: int) -> tuple[Tensor, KVCache]:
        cache, start = model.backbone_cache(2, prompt.length + 6), 0
        for size in sizes:
            hidden = model.advance(whole[:, start : start + size], cache, start)
            start += size
        return hidden, cache

    hidden, stepped = advance(prompt.length, *[1] * 6)
    for sizes in ((prompt.length + 6,), (prompt.length, 6), (3, prompt.length - 3, 4, 2)):
        got, cache = advance(*sizes)
        torch.testing.assert_close(got, hidden, atol=1e-5, rtol=0)
        torch.testing.assert_close(cache.keys, stepped.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(cache.values, stepped.values, atol=1e-5, rtol=0)


@torch.inference_mode()
@CHECKPOINTS
def test_positions_that_are_alike_are_computed_once(checkpoint: Checkpoint) -> None:
    """The cache then holds what computing all of them would leave there."""
    model, count = HeartMuLa(checkpoint.lm, torch.float32), 40
    load_weights(model, checkpoint.lm_path)
    whole, once = model.backbone_cache(1, count + 2), model.backbone_cache(1, count + 2)
    model.advance(model.unconditional.expand(1, count, -1), whole, 0)
    model.backbone.repeat(model.unconditional[None], once, count)
    torch.testing.assert_close(once.keys, whole.keys, atol=1e-5, rtol=0)
    torch.testing.assert_close(once.values, whole.values, atol=1e-5, rtol=0)
    assert once.keys[:, :, :, :count].any(dim=-1).all()
    assert not once.keys[:, :, :, count:].any()


@pytest.mark.parametrize("beyond", [0, 3])
def test_a_song_that_was_all_but_ended_ends_at_the_next_step(beyond: int) -> None:
    """This holds even if its frames would not fit into the song's positions."""
    prompt = prompt_of(TINY)
    backbone = msgspec.structs.replace(TINY.lm.backbone, max_seq_len=prompt.length + 5)
    engine = ready(msgspec.structs.replace(TINY, lm=msgspec.structs.replace(TINY.lm, backbone=backbone)))
    made = np.zeros((8, 5 + beyond), np.int16)
    for one in (engine, TrivialEngine(0)):
        one.admit("song", Song(prompt=prompt, max_frames=5), made)
        assert one.step() == {"song": None}
        assert one.step() == {}


DAMAGED: dict[str, np.ndarray] = {
    "shape": np.zeros((7, 3), np.int16),
    "transposed": np.zeros((3, 8), np.int16),
    "flat": np.zeros(8, np.int16),
    "dtype": np.zeros((8, 3), np.int64),
}
FOREIGN: dict[str, np.ndarray] = {
    "negative": np.full((8, 3), -1, np.int16),
    "vocabulary": np.full((8, 3), TINY.lm.audio_vocab_size, np.int16),
    "end token": np.full((8, 3), TINY.gen.audio_eos_id, np.int16),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_frames_are_refused(damage: str) -> None:
    engines: list[TokenEngine] = [ready(TINY), TrivialEngine(0)]
    for engine in engines:
        with pytest.raises(ValueError, match="frames to continue from"):
            engine.admit("song", Song(prompt=prompt_of(TINY), max_frames=9), DAMAGED[damage])
        assert engine.step() == {}


@pytest.mark.parametrize("codes", FOREIGN)
def test_frames_of_another_checkpoint_fail_the_song_in_words(codes: str) -> None:
    engines: list[TokenEngine] = [ready(TINY), TrivialEngine(0)]
    for engine in engines:
        with pytest.raises(SongError, match="another model made them"):
            engine.admit("song", Song(prompt=prompt_of(TINY), max_frames=9), FOREIGN[codes])
        assert engine.step() == {}


def recorded_caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[KVCache]]:
    """The caches of all songs that are begun from now on."""
    caches: list[weakref.ref[KVCache]] = []
    empty = HeartMuLa.backbone_cache

    def record(model: HeartMuLa, rows: int, positions: int) -> KVCache:
        cache = empty(model, rows, positions)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(HeartMuLa, "backbone_cache", record)
    return caches


def full(*_: object) -> Tensor:
    raise torch.OutOfMemoryError("tried to allocate 5 GiB")


def broken(*_: object) -> Tensor:
    raise RuntimeError("a fault of ours")


def test_a_full_device_admits_nothing_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for as long as the error is kept, whose traceback refers to frames that held the song's tensors."""
    engine, song = ready(TINY), Song(prompt=prompt_of(TINY), max_frames=9, topk=5, seed=3)
    whole = generate(engine, song)
    caches = recorded_caches(monkeypatch)
    with monkeypatch.context() as patch:  # the prompt is prefilled by then
        patch.setattr(HeartMuLa, "embed_frames", full)
        with pytest.raises(DeviceFull, match="5 GiB") as kept:
            engine.admit("song", song, whole[:, :4])
    assert len(caches) == 1
    assert caches[0]() is None
    assert kept.value.__context__ is not None, "the error is there still"
    assert engine.step() == {}
    assert np.array_equal(generate(engine, song, whole[:, :4]), whole[:, 4:])


@pytest.mark.parametrize(("fault", "error"), [(full, DeviceFull), (broken, RuntimeError)])
def test_songs_that_are_dropped_after_an_error_are_gone_while_the_error_is_kept(
    fault: Callable[..., Tensor], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, song = ready(TINY, slots=2), Song(prompt=prompt_of(TINY), max_frames=9, topk=5, seed=3)
    caches = recorded_caches(monkeypatch)
    engine.admit("one", song)
    engine.admit("two", song)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(HeartMuLa, "next_frame", fault)
        with pytest.raises(error) as kept:
            engine.step()
    engine.drop("two")
    assert [cache() is None for cache in caches] == [False, True]
    assert engine.step()["one"] is not None
    engine.drop("one")
    assert [cache() is None for cache in caches] == [True, True]
    assert kept.value.__traceback__ is not None, "the error is there still"


def test_the_trivial_engine_goes_on_as_well() -> None:
    song = Song(prompt=prompt_of(TINY), max_frames=9, seed=3)
    whole = generate(TrivialEngine(0), song)
    assert whole.shape == (8, 9)
    for made in (0, 1, 8, 9):
        assert np.array_equal(generate(TrivialEngine(0), song, whole[:, :made]), whole[:, made:])
