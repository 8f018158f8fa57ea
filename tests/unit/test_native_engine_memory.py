"""Memory that songs take and return. Resident memory is printed (`pytest -s`), not asserted."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from tests.unit.native_engines import DEMO, live_tensors, one_thread, prompt_of, ready, resident_bytes  # noqa: F401


def songs() -> Iterator[Song]:
    """Create short songs, no two alike."""
    prompt, seed = prompt_of(DEMO), 0
    while True:
        seed += 1
        cfg_scale, temperature = (1, 1.5)[seed % 2], (0, 1.0, 0.8)[seed % 3]
        yield Song(
            prompt=prompt, max_frames=8 + seed % 4, cfg_scale=cfg_scale, temperature=temperature, topk=5, seed=seed
        )


def turn(engine: NativeEngine, queue: Iterator[Song]) -> int:
    """Run a turn as a worker does: songs end, are dropped, go on after an interruption, and the last two
    are still there when the weights leave. Returns how many songs it took."""
    engine.to_device()
    made: list[np.ndarray] = []
    interrupted = next(queue)
    engine.admit("dropped", next(queue))
    engine.admit("interrupted", interrupted)
    engine.admit("ends", next(queue))
    for _ in range(4):
        frame = engine.step()["interrupted"]
        assert frame is not None
        made.append(frame)
    engine.drop("dropped")
    engine.drop("interrupted")
    engine.admit("goes on", interrupted, np.stack(made, axis=1))
    while "ends" in engine.step():
        pass
    engine.drop("goes on")
    engine.admit("late", next(queue))
    engine.admit("later", next(queue))
    engine.step()
    engine.to_host()
    return 5


def test_thirty_songs_leave_nothing_behind() -> None:
    engine, queue = ready(DEMO, slots=3), songs()
    engine._weights._copies = True  # as to a GPU
    count = turn(engine, queue)
    first, resident = live_tensors(), resident_bytes()
    while count < 30:
        count += turn(engine, queue)
        assert live_tensors() == first, count
    print(f"RSS grew by {(resident_bytes() - resident) / 2**20:.1f} MB over {count - 5} songs")


@pytest.mark.parametrize(("cfg_scale", "dtype"), [(1.0, "float32"), (1.5, "bfloat16"), (0.5, "bfloat16")])
def test_a_song_takes_what_it_was_said_to_take(cfg_scale: float, dtype: str) -> None:
    """A song takes no byte more and hardly less, from its beginning or continued near its end."""
    engine = ready(DEMO, dtype)
    song = Song(prompt=prompt_of(DEMO), max_frames=300, cfg_scale=cfg_scale)
    for made in (np.zeros((8, 0), np.int16), np.zeros((8, 290), np.int16)):
        _, before = live_tensors()
        engine.admit("song", song, made)
        for _ in range(2):
            _, after = live_tensors()
            assert 0.99 * engine.song_bytes(song) < after - before <= engine.song_bytes(song)
            engine.step()
        engine.drop("song")
        assert live_tensors()[1] == before


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest result of an operation, views and changed arguments aside."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and not func._schema.is_mutable:
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


@torch.inference_mode()
def test_a_long_prompt_takes_no_more_memory_on_the_way_than_one_layer_of_it() -> None:
    """The unconditional row's keys are rotated layer by layer; of all layers at once they would be twice the cache."""
    model = ready(DEMO, "bfloat16")._model
    positions = 1500
    cache = model.backbone_cache(1, positions)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        model.backbone.repeat(model.unconditional[None], cache, positions)
    one_layer = 2 * cache.keys[0].nbytes  # in float32
    assert largest.nbytes <= one_layer < cache.keys.nbytes
