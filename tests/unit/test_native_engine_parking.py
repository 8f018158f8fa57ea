"""Songs that are paused and go on with their own caches, which waited for them in host memory."""

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from services.tokenizer_worker.engines import native, parked
from services.tokenizer_worker.engines.base import PARKED_SECONDS, Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.engines.parked import ParkedCaches
from services.tokenizer_worker.engines.prefill import prefill
from services.tokenizer_worker.model import HeartMuLa, KVCache
from shared.errors import DeviceFull
from tests.unit.native_engines import DEMO, TINY, generate, one_thread, prompt_of, ready  # noqa: F401
from tests.unit.test_weights import Runtime, runtime  # noqa: F401

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
NOTHING = np.zeros((8, 0), np.int16)
Frames = dict[str, np.ndarray]  # of each song, int16 [8, T]


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[Song]:
    """The songs that are prefilled from now on."""
    found: list[Song] = []

    def record(model: HeartMuLa, song: Song, *rest: Any) -> None:
        found.append(song)
        prefill(model, song, *rest)

    monkeypatch.setattr(native, "prefill", record)
    return found


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Host memory to spare, in bytes."""
    found = SimpleNamespace(spare=2**30)
    monkeypatch.setattr(native, "spare_bytes", lambda: found.spare)
    return found


def steps(engine: NativeEngine, made: Frames, count: int) -> None:
    """Step, and add the frames to those `made`."""
    for _ in range(count):
        for name, frame in engine.step().items():
            if frame is not None:
                made[name] = np.column_stack((made[name], frame))


def pause(engine: NativeEngine, songs: dict[str, Song], made: Frames) -> None:
    """Park songs, as at the end of a turn, and let them come back in the next."""
    for name in songs:
        engine.park(name, made[name])
    assert engine.step() == {}
    engine.to_host()
    engine.to_device()
    for name, song in songs.items():
        engine.admit(name, song, made[name])


@DTYPES
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_a_parked_song_goes_on_as_if_never_paused(
    cfg_scale: float, dtype: str, prefills: list[Song], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parked, "_POSITIONS", 3)  # several chunks, the last of them in part
    song = Song(prompt=prompt_of(DEMO), max_frames=28, topk=5, cfg_scale=cfg_scale, seed=3)
    engine = ready(DEMO, dtype)
    whole = generate(engine, song)
    last = whole.shape[1]
    assert last > 20
    for count in (0, 1, 17, last):
        made = {"song": NOTHING}
        engine.admit("song", song)
        steps(engine, made, count)
        prefills.clear()
        pause(engine, {"song": song}, made)
        assert prefills == []
        steps(engine, made, 29 - count)
        assert np.array_equal(made["song"], whole), count
        assert engine.step() == {}


def company() -> dict[str, Song]:
    """Songs that differ in all that a batch depends on."""
    prompt = prompt_of(DEMO)
    short = replace(prompt, lyrics=prompt.lyrics[:2])
    return {
        "a": Song(prompt=prompt, max_frames=24, topk=5, seed=1),
        "b": Song(prompt=short, max_frames=20, topk=50, seed=2, cfg_scale=1, temperature=1.3),
        "c": Song(prompt=prompt, max_frames=22, topk=5, seed=1, cfg_scale=0.5),
    }


@DTYPES
def test_songs_that_come_back_in_the_same_company_are_the_same(dtype: str, prefills: list[Song]) -> None:
    songs = company()

    def make(pauses: tuple[int, ...]) -> Frames:
        engine, made = ready(DEMO, dtype, slots=3), dict.fromkeys(songs, NOTHING)
        for name, song in songs.items():
            engine.admit(name, song)
        for before in pauses:
            steps(engine, made, before)
            pause(engine, songs, made)
        steps(engine, made, 25 - sum(pauses))
        return made

    undisturbed, disturbed = make(()), make((1, 6, 1, 9))
    assert len(prefills) == 4, "songs were prefilled when they came back, or one that begins like another"
    for name in songs:
        assert np.array_equal(disturbed[name], undisturbed[name]), name


def test_in_float32_a_parked_song_is_the_same_in_any_company(prefills: list[Song]) -> None:
    songs = company()
    alone = {name: generate(ready(DEMO), song) for name, song in songs.items()}
    engine, made = ready(DEMO, slots=3), dict.fromkeys(songs, NOTHING)
    for name, song in songs.items():
        engine.admit(name, song)
    steps(engine, made, 7)
    prefills.clear()
    engine.park("c", made["c"])
    steps(engine, made, 3)
    engine.park("a", made["a"])
    engine.admit("c", songs["c"], made["c"])
    steps(engine, made, 15)
    engine.admit("a", songs["a"], made["a"])
    steps(engine, made, 25)
    assert prefills == []
    for name in songs:
        assert np.array_equal(made[name], alone[name]), name


def begun(song: Song, frames: int) -> tuple[NativeEngine, np.ndarray]:
    """An engine in which a song was parked at a frame, and its frames."""
    engine, made = ready(TINY), {"song": NOTHING}
    engine.admit("song", song)
    steps(engine, made, frames)
    engine.park("song", made["song"])
    return engine, made["song"]


@pytest.mark.parametrize("change", ["a code", "fewer", "other song"])
def test_caches_of_other_tokens_are_never_used(change: str, prefills: list[Song]) -> None:
    """Then the song is prefilled, and goes on as one that had these tokens all along."""
    song = Song(prompt=prompt_of(TINY), max_frames=12, topk=5, seed=3)
    engine, made = begun(song, 6)
    if change == "a code":
        made = made.copy()
        made[7, 0] ^= 1
    elif change == "fewer":
        made = made[:, :5]
    else:
        song = replace(song, prompt=replace(song.prompt, lyrics=song.prompt.lyrics[::-1]))
    expected = generate(ready(TINY), song, made)
    prefills.clear()
    assert np.array_equal(generate(engine, song, made), expected)
    assert prefills == [song]
    assert "song" not in engine._parked


def test_a_song_that_went_on_or_was_dropped_is_not_kept(prefills: list[Song]) -> None:
    song = Song(prompt=prompt_of(TINY), max_frames=12, topk=5, seed=3)
    engine, made = begun(song, 6)
    engine.admit("song", song, made)
    engine.drop("song")  # as when it is cancelled
    assert "song" not in engine._parked
    prefills.clear()
    engine.admit("song", song, made)
    assert prefills == [song]


def test_frames_that_the_song_does_not_have_are_refused() -> None:
    song = Song(prompt=prompt_of(TINY), max_frames=12, topk=5, seed=3)
    engine, made = ready(TINY), {"song": NOTHING}
    engine.admit("song", song)
    steps(engine, made, 6)
    with pytest.raises(ValueError, match="has 6 frames, not 5"):
        engine.park("song", made["song"][:, :5])
    assert engine.step() == {}, "it left the batch all the same"
    engine.park("unknown", NOTHING)


def test_a_song_that_found_the_device_full_is_still_parked(
    prefills: list[Song], monkeypatch: pytest.MonkeyPatch
) -> None:
    song = Song(prompt=prompt_of(TINY), max_frames=12, topk=5, seed=3)
    whole = generate(ready(TINY), song)
    engine, made = begun(song, 6)
    prefills.clear()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 5 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(engine._frames, "gather", full)
        with pytest.raises(DeviceFull):
            engine.admit("song", song, made)
    assert np.array_equal(generate(engine, song, made), whole[:, 6:])
    assert prefills == []


def test_without_host_memory_to_spare_songs_are_prefilled(prefills: list[Song], room: SimpleNamespace) -> None:
    song = Song(prompt=prompt_of(TINY), max_frames=12, topk=5, seed=3)
    whole = generate(ready(TINY), song)
    room.spare = 0
    engine, made = begun(song, 6)
    assert engine._parked.nbytes == 0
    prefills.clear()
    assert np.array_equal(generate(engine, song, made), whole[:, 6:])
    assert prefills == [song]


# The copies by themselves


CPU, CUDA = torch.device("cpu"), SimpleNamespace(type="cuda")
FLAVOR = TINY.lm.backbone
SONG = Song(prompt=prompt_of(TINY), max_frames=300, cfg_scale=1)
CHUNK = KVCache.size(FLAVOR, 2, parked._POSITIONS, torch.float32)


class Copies:
    """Parked caches of songs with room for so many chunks. A song takes one chunk."""

    def __init__(self, chunks: int, device: Any = CPU) -> None:
        self.chunks = chunks
        self.parked = ParkedCaches(FLAVOR, torch.float32, device, self.spare)
        self.cache = KVCache.empty(FLAVOR, 1, 300, torch.float32, CPU)

    def spare(self) -> int:
        return max(0, self.chunks * CHUNK - self.parked.nbytes)

    def park(self, name: str, frames: int = 20) -> None:
        self.parked.park(name, SONG, np.zeros((8, frames), np.int16), NOTHING, self.cache)

    def kept(self, names: str) -> str:
        return "".join(name for name in names if name in self.parked)


def test_the_songs_parked_longest_make_room_and_memory_is_bounded() -> None:
    copies = Copies(chunks=3)
    for name in "abc":
        copies.park(name)
    assert (copies.kept("abc"), copies.parked.nbytes) == ("abc", 3 * CHUNK)
    copies.park("d")
    assert (copies.kept("abcd"), copies.parked.nbytes) == ("bcd", 3 * CHUNK)
    copies.park("e", frames=200)  # two chunks
    assert (copies.kept("abcde"), copies.parked.nbytes) == ("de", 3 * CHUNK)
    copies.park("d")  # once more, instead of before
    assert (copies.kept("abcde"), copies.parked.nbytes) == ("de", 3 * CHUNK)


def test_memory_that_became_scarce_is_not_taken() -> None:
    copies = Copies(chunks=2)
    copies.park("a")
    copies.chunks = 0
    copies.park("b")
    assert (copies.kept("ab"), copies.parked.nbytes) == ("b", CHUNK)
    copies.park("c", frames=200)
    assert copies.kept("abc") == "b", "no copy goes for one that cannot be kept anyway"


def test_songs_that_do_not_come_back_are_dropped_and_their_memory_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies, now = Copies(chunks=3), 1000.0
    monkeypatch.setattr(parked, "time", SimpleNamespace(monotonic=lambda: now))
    copies.park("a")
    now += PARKED_SECONDS / 2
    copies.park("b")
    copies.parked.expire()
    assert copies.kept("ab") == "ab"
    now += PARKED_SECONDS / 2
    copies.parked.expire()
    assert copies.kept("ab") == "b"
    copies.parked.drop("b")  # it has come back; its memory waits for the next pause
    assert copies.parked.nbytes == 2 * CHUNK
    now += PARKED_SECONDS / 2
    copies.parked.expire()
    assert copies.parked.nbytes == 0


def no_memory(*_: object) -> None:
    raise OSError(12, "Cannot allocate memory")


def test_a_system_without_memory_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies(chunks=3)
    monkeypatch.setattr(parked, "mmap", SimpleNamespace(mmap=no_memory))
    copies.park("a")
    assert (copies.kept("a"), copies.parked.nbytes) == ("", 0)


@pytest.mark.parametrize("runtime", [0], indirect=True)
def test_on_cuda_memory_is_page_locked_once_and_released(
    runtime: Runtime,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parked, "PARKED_SECONDS", 0)
    copies = Copies(3, CUDA)
    copies.park("a")
    copies.park("b", frames=200)
    locked = dict(runtime.locked)
    assert list(locked.values()) == [CHUNK] * 3
    copies.parked.drop("b")
    copies.park("c", frames=200)
    assert runtime.locked == locked
    copies.parked.expire()
    assert not runtime.locked


@pytest.mark.parametrize("runtime", [2], indirect=True)
def test_without_page_locking_nothing_is_kept_and_it_is_said_once(
    runtime: Runtime,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    copies = Copies(3, CUDA)
    with caplog.at_level(logging.WARNING):
        copies.park("a")
        copies.park("b")
    assert (copies.kept("ab"), copies.parked.nbytes) == ("", 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "prefilled again" in caplog.text
