"""Memory: what runs out is survived, what was taken is given back, and many turns leave nothing behind."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from services.codec_worker.engines.native import NativeCodec
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import KVCache
from shared.errors import DeviceFull
from shared.model.checkpoint import Checkpoint
from tests.gpu.conftest import DEMO
from tests.gpu.engines import advance, codes_of, generate, prompt_of, ready, songs_of, stacked

MB = 2**20


def used() -> int:
    """Bytes in use on the device by all programs; what torch only keeps in reserve is given back first."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def resident() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def full_device(monkeypatch: pytest.MonkeyPatch, device: str, left: int) -> Iterator[None]:
    """Take all of the device's memory but some `left` bytes; on the CPU a fourth cache finds none."""
    if device == "cpu":
        empty, calls = KVCache.empty, iter((True, True, True))

        def refuse(*arguments: object) -> KVCache:
            if not next(calls, False):
                raise torch.OutOfMemoryError("tried to allocate 5 GiB")
            return empty(*arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "empty", refuse)
            yield
        return
    filler: list[Tensor] = []
    spare = torch.empty(left, dtype=torch.uint8, device=device)
    block = 1 << 32
    while block >= MB:
        try:
            filler.append(torch.empty(block, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            block //= 2
    del spare
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        filler.clear()
        torch.cuda.empty_cache()


def crowd(engine: NativeEngine, song: Song, made: dict[str, list[np.ndarray]]) -> None:
    """Admit the song again and again, with some frames between."""
    for number in range(engine.slots):
        name = f"song {number}"
        engine.admit(name, song)
        made[name] = []
        if number % 8 == 0:
            advance(engine, made, 1)


def test_songs_go_on_after_the_device_was_full(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Songs are admitted until one finds no memory; those before it are as if nothing had happened."""
    slots, song = 400, Song(prompt=prompt_of(29), max_frames=200, topk=5, seed=1)
    alone = generate(ready(DEMO, device, way="graphs"), song)
    engine = ready(DEMO, device, slots=slots, way="graphs")
    made: dict[str, list[np.ndarray]] = {}
    with full_device(monkeypatch, device, 96 * MB):
        with pytest.raises(DeviceFull):
            crowd(engine, song, made)
        assert made, "not one song fitted"
        for name in list(made)[3:]:  # room for the work of a frame, as the worker makes it
            engine.drop(name)
            del made[name]
        advance(engine, made, 10)
    engine.admit("late", song)
    made["late"] = []
    advance(engine, made)
    for name, frames in made.items():
        assert np.array_equal(stacked(frames), alone), name


@pytest.mark.gpu
def test_weights_that_do_not_fit_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    song = songs_of(DEMO, 8)["song 1"]
    engine = NativeEngine(DEMO, "cuda:0", "float32")
    codec = NativeCodec(DEMO, "cuda:0", "float32", steps=2)
    for model in (engine, codec):
        model.load()
        with full_device(monkeypatch, "cuda:0", 0), pytest.raises(DeviceFull):
            model.to_device()
        model.to_device()
    assert generate(engine, song).shape == (8, 8)


@pytest.mark.gpu
def test_the_codec_goes_on_after_the_device_was_full(
    monkeypatch: pytest.MonkeyPatch, golden_checkpoint: Checkpoint
) -> None:
    codes = codes_of(DEMO, 40)
    codec = NativeCodec(DEMO, "cuda:0", "float32", steps=2)
    codec.load()
    codec.to_device()
    whole = [step.audio for step in codec.decode(codes, seed=1) if step.audio is not None]
    with full_device(monkeypatch, "cuda:0", 0), pytest.raises(DeviceFull):
        list(codec.decode(codes, seed=1))
    again = [step.audio for step in codec.decode(codes, seed=1) if step.audio is not None]
    assert np.array_equal(np.concatenate(again), np.concatenate(whole))


def turn(engine: NativeEngine, codec: NativeCodec) -> None:
    """A turn of each model: weights to the device, songs, weights away."""
    engine.to_device()
    for name, song in songs_of(DEMO, 12).items():
        engine.admit(name, song)
    advance(engine, {name: [] for name in songs_of(DEMO, 12)}, 6)
    engine.to_host()
    codec.to_device()
    for _ in codec.decode(codes_of(DEMO, 8), seed=1):
        break  # a song that is cancelled
    codec.to_host()


def engines(device: str) -> tuple[NativeEngine, NativeCodec]:
    engine = ready(DEMO, device, slots=8, way="graphs")
    engine.to_host()
    codec = NativeCodec(DEMO, device, "float32", steps=1)
    codec.load()
    return engine, codec


@pytest.mark.gpu
def test_each_phase_gives_its_memory_back(say: Callable[..., None]) -> None:
    """Kernels and libraries that were loaded stay with the process, once; a model's memory does not."""
    engine, codec = engines("cuda:0")
    start = used()
    turn(engine, codec)
    once = used() - start
    left = {}
    for name, phase in (("lm", engine), ("codec", codec)):
        before = used()
        phase.to_device()
        if name == "lm":
            for song_id, song in songs_of(DEMO, 40).items():
                engine.admit(song_id, song)
            advance(engine, {song_id: [] for song_id in songs_of(DEMO, 40)}, 8)
        else:
            list(codec.decode(codes_of(DEMO, 20), seed=1))
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        at_work = total - free - before
        phase.to_host()
        left[name] = {"at_work_mb": at_work // MB, "left_mb": (used() - before) // MB}
    say(first_turn_leaves_mb=once // MB, **left)
    assert once < 400 * MB
    assert all(found["left_mb"] <= 4 for found in left.values())


def test_turns_leave_nothing_behind(device: str, say: Callable[..., None]) -> None:
    """Fifty on a card; on the CPU a few, to see that they are made."""
    engine, codec = engines(device)
    turns = 50 if device != "cpu" else 1
    for number in range(turns):
        turn(engine, codec)
        if number == turns // 5:
            before = used(), resident()
    grown = used() - before[0], resident() - before[1]
    if device != "cpu":
        say(turns=turns, device_grew_mb=round(grown[0] / MB, 1), host_grew_mb=round(grown[1] / MB, 1))
        assert grown[0] <= 4 * MB
        assert grown[1] <= 64 * MB


@pytest.mark.gpu
def test_where_the_weights_come_back_to(say: Callable[..., None]) -> None:
    """No promise, a fact to know: were it always one address, graphs could outlive a turn."""
    engine, codec = engines("cuda:0")
    addresses = []
    for _ in range(6):
        engine.to_device()
        addresses.append(engine._model.head.weight.data_ptr())
        engine.to_host()
        codec.to_device()
        codec.to_host()
    say(addresses=len(set(addresses)), same_address=len(set(addresses)) == 1)
