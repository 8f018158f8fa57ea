"""Songs in the native token engine: their ends and limits, its slots, caches and phases. Numbers are tests/golden's."""

import dataclasses
import weakref

import msgspec
import pytest
import torch
from torch import Tensor

from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import HeartMuLa, KVCache
from shared.errors import DeviceFull, PhaseError, SongError
from tests.unit.native_engines import TINY, generate, one_thread, prompt_of, ready  # noqa: F401

PROMPT = prompt_of(TINY)


@pytest.fixture
def engine() -> NativeEngine:
    return ready(TINY)


def test_ends_at_max_frames_and_leaves_the_batch(engine: NativeEngine) -> None:
    engine.admit("song", Song(prompt=PROMPT, max_frames=2, temperature=0))
    assert [engine.step()["song"] is None for _ in range(3)] == [False, False, True]
    assert engine.step() == {}


@pytest.mark.parametrize("at", [0, 3])
def test_an_end_token_ends_a_song_before_its_frame(
    at: int, engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter(range(10))
    end = TINY.gen.audio_eos_id

    def frame(*_: object) -> Tensor:
        return torch.tensor([[end - 1] * 7 + [end if next(made) == at else 0]])

    monkeypatch.setattr(HeartMuLa, "frame", frame)
    made_before = [[end - 1] * 7 + [0]] * at
    assert generate(engine, Song(prompt=PROMPT, max_frames=10)).T.tolist() == made_before
    assert engine.step() == {}


def test_a_song_may_fill_the_models_positions_but_no_more() -> None:
    backbone = msgspec.structs.replace(TINY.lm.backbone, max_seq_len=PROMPT.length + 4)
    engine = ready(msgspec.structs.replace(TINY, lm=msgspec.structs.replace(TINY.lm, backbone=backbone)))
    song = Song(prompt=PROMPT, max_frames=4, temperature=0)
    assert generate(engine, song).shape == (8, 4)
    with pytest.raises(SongError, match="positions"):
        engine.admit("song", dataclasses.replace(song, max_frames=5))
    assert engine.step() == {}


# Slots, caches, phases


def test_drop_frees_the_slot_and_the_caches(engine: NativeEngine, caches: list[weakref.ref[KVCache]]) -> None:
    song = Song(prompt=PROMPT, max_frames=5)
    engine.admit("a", song)
    engine.step()
    with pytest.raises(ValueError, match="b"):
        engine.admit("b", song)
    engine.drop("unknown")
    assert sum(cache() is not None for cache in caches) == 2  # of the backbone and of the depth decoder
    engine.drop("a")
    assert not any(cache() for cache in caches)
    assert engine.step() == {}
    engine.admit("b", song)
    assert list(engine.step()) == ["b"]


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[KVCache]]:
    """Every cache that is made during the test."""
    made: list[weakref.ref[KVCache]] = []
    init = KVCache.__init__

    def record(self: KVCache, keys: Tensor, values: Tensor) -> None:
        init(self, keys, values)
        made.append(weakref.ref(self))

    monkeypatch.setattr(KVCache, "__init__", record)
    return made


def test_nothing_runs_off_the_device() -> None:
    engine = NativeEngine(TINY, "cpu", "float32")
    song = Song(prompt=PROMPT, max_frames=2)
    with pytest.raises(PhaseError, match="not loaded"):
        engine.to_device()
    engine.load()
    with pytest.raises(PhaseError, match="not on the device"):
        engine.admit("song", song)
    engine.to_device()
    engine.admit("song", song)
    engine.to_host()
    with pytest.raises(PhaseError, match="not on the device"):
        engine.step()
    engine.to_device()
    assert engine.step() == {}, "leaving the device forgets the songs"


def test_a_full_device_is_reported_and_nothing_is_admitted(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    song = Song(prompt=PROMPT, max_frames=2)

    def full(*_: object) -> KVCache:
        raise torch.OutOfMemoryError("tried to allocate 5 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(HeartMuLa, "depth_cache", full)
        with pytest.raises(DeviceFull, match="5 GiB"):
            engine.admit("song", song)
    engine.admit("song", song)
    assert engine.step()["song"] is not None
