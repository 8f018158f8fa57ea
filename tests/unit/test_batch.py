"""Songs in a batch: when each leaves it, and which song an error is attributed to."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from services.tokenizer_worker import batch
from services.tokenizer_worker.batch import Batch, BatchedSong
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.trivial import TrivialEngine
from shared.errors import DeviceBroken, DeviceFull, LeaseLost
from shared.model.prompt import Prompt
from shared.worker.signals import JobStopped, Paused

NOTHING = np.zeros((8, 0), np.int16)


class Engine(TrivialEngine):
    """An engine with memory for `room` songs that fails at the song `poison`."""

    def __init__(self, slots: int, room: int = 99, poison: str = "") -> None:
        super().__init__(1, slots)
        self.room, self.poison = room, poison
        self.error: Exception = RuntimeError("poison")
        self.most = 0  # songs at once in a step that went well
        self.parked: dict[str, np.ndarray] = {}
        self.park_error: Exception | None = None
        self.expired = threading.Event()

    def park(self, song_id: str, frames: np.ndarray) -> None:
        super().park(song_id, frames)
        if self.park_error is not None:
            raise self.park_error
        self.parked[song_id] = frames

    def expire(self) -> None:
        self.expired.set()

    def step(self) -> dict[str, np.ndarray | None]:
        if len(self._songs) > self.room:
            raise DeviceFull("no memory left")
        if self.poison in self._songs:
            raise self.error
        self.most = max(self.most, len(self._songs))
        return super().step()


class Ledger:
    """Replacement of a turn: the real one needs a lease."""

    def __init__(self) -> None:
        self.booked: set[str] = set()

    def place_work(self, label: str, nbytes: int) -> None:
        self.booked.add(label)

    def remove(self, label: str) -> None:
        self.booked.discard(label)


class JobContext:
    """Replacement of a job context: `trouble` is what its next check raises."""

    def __init__(self, job_id: str, turn: Ledger) -> None:
        self.job: Any = type("Job", (), {"job_id": job_id, "parent": None})
        self.turn = turn
        self.trouble: Exception | None = None
        self.pause = False

    def check(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    def check_pause(self) -> None:
        if self.pause:
            raise Paused("another worker's turn")


class Songs:
    """Makes songs in a batch."""

    def __init__(self, engine: Engine, executor: Executor) -> None:
        self.engine, self.batch, self.turn = engine, Batch(engine), Ledger()
        self.executor = executor
        self.contexts: dict[str, JobContext] = {}

    async def make(
        self, name: str, frames: int, before: np.ndarray = NOTHING, on_frame: Any = None, returns: bool = True
    ) -> BatchedSong:
        context: Any = JobContext(name, self.turn)
        self.contexts[name] = context
        song = Song(prompt=Prompt((1,), (1,)), max_frames=frames, seed=ord(name))
        on_frame = on_frame or (lambda _: None)
        return await self.batch.generate(context, song, before, self.executor, on_frame, lambda: returns)


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


async def test_a_song_is_the_same_alone_in_company_and_in_pieces(executor: Executor) -> None:
    alone = (await Songs(Engine(1), executor).make("a", 30)).codes
    songs = Songs(Engine(3), executor)
    together = await asyncio.gather(*(songs.make(name, length) for name, length in (("a", 30), ("b", 9), ("c", 50))))
    assert np.array_equal(together[0].codes, alone)
    assert [batched.codes.shape for batched in together] == [(8, 30), (8, 9), (8, 50)]
    assert np.array_equal((await songs.make("a", 30, alone[:, :11])).codes, alone)
    assert songs.turn.booked == set()


class Ahead(Engine):
    """An engine that returns the frames of the previous step, as on CUDA."""

    def __init__(self) -> None:
        super().__init__(3)
        self.last: dict[str, np.ndarray | None] = {}

    def step(self) -> dict[str, np.ndarray | None]:
        last, self.last = self.last, super().step()
        return last


class Full(Engine):
    """An engine whose device is full as it admits a song."""

    def __init__(self) -> None:
        super().__init__(1)
        self.dropped: list[str] = []

    def admit(self, song_id: str, song: Song, frames: np.ndarray | None = None) -> None:
        raise DeviceFull("half of the cache is allocated")

    def drop(self, song_id: str) -> None:
        self.dropped.append(song_id)


async def test_what_was_allocated_for_a_song_that_did_not_fit_goes_back(executor: Executor) -> None:
    songs = Songs(engine := Full(), executor)
    batched = await songs.make("a", 7)
    assert isinstance(batched.future.exception(), DeviceFull)
    assert engine.dropped == ["a"]


async def test_frames_may_come_a_step_later(executor: Executor) -> None:
    songs = Songs(Ahead(), executor)
    made = await asyncio.gather(*(songs.make(name, frames) for name, frames in (("a", 7), ("b", 1), ("c", 30))))
    for batched, frames in zip(made, (7, 1, 30), strict=True):
        batched.future.result()
        assert batched.codes.shape == (8, frames)
    assert songs.batch.rate.per_second


async def test_a_paused_song_has_got_further_however_early_it_is_paused(executor: Executor) -> None:
    songs = Songs(Engine(1), executor)

    def pause(batched: BatchedSong) -> None:
        songs.contexts["a"].pause = True

    codes = NOTHING
    for turns in range(1, 4):
        batched = await songs.make("a", 20, codes, pause)
        assert isinstance(batched.future.exception(), Paused)
        codes = batched.codes
        assert codes.shape[1] == turns
    assert songs.turn.booked == set()


async def test_when_the_device_breaks_no_song_is_tried_again_on_it(executor: Executor) -> None:
    songs = Songs(Engine(4, poison="b"), executor)
    songs.engine.error = DeviceBroken("illegal memory access")
    gate = threading.Event()
    executor.submit(gate.wait)  # until all three are there
    coming = asyncio.gather(*(songs.make(name, 10) for name in "abc"))
    await asyncio.sleep(0)
    gate.set()
    makings = await coming
    assert [type(batched.future.exception()) for batched in makings] == [DeviceBroken] * 3


@pytest.mark.parametrize("trouble", [JobStopped("cancelled"), LeaseLost("gone")])
async def test_a_song_that_must_stop_does_so_before_the_next_step_and_the_others_go_on(
    executor: Executor, trouble: Exception
) -> None:
    songs = Songs(Engine(2), executor)

    def stop(batched: BatchedSong) -> None:
        if len(batched.frames) == 5:
            songs.contexts["a"].trouble = trouble

    one, other = await asyncio.gather(songs.make("a", 100, on_frame=stop), songs.make("b", 40))
    assert one.future.exception() is trouble
    assert one.codes.shape[1] == 5
    assert other.future.exception() is None
    assert other.codes.shape[1] == 40


async def test_when_memory_runs_out_half_of_the_songs_go_on_and_the_rest_keep_their_frames(executor: Executor) -> None:
    songs = Songs(Engine(4, room=2), executor)
    makings = await asyncio.gather(*(songs.make(name, 10) for name in "abcd"))
    errors = [type(batched.future.exception()) for batched in makings]
    assert errors.count(type(None)) == 2
    assert errors.count(Paused) == 2
    assert songs.engine.most == 2
    alone = await songs.make("e", 10)
    assert alone.future.exception() is None


async def test_a_song_for_which_there_is_no_memory_even_alone_ends_with_that_error(executor: Executor) -> None:
    songs = Songs(Engine(4, room=0), executor)
    batched = await songs.make("a", 10)
    assert isinstance(batched.future.exception(), DeviceFull)
    assert songs.turn.booked == set()


async def test_only_the_song_that_breaks_the_engine_is_blamed_for_it(executor: Executor) -> None:
    songs = Songs(Engine(4, poison="c"), executor)
    blamed: list[str] = []
    done: dict[str, BatchedSong] = {}
    waiting = dict.fromkeys("abcd", NOTHING)
    while waiting:  # as the worker does: paused songs come again, as many at once as the batch takes
        names = sorted(waiting)[: songs.batch.limit]
        for name, batched in zip(
            names, await asyncio.gather(*(songs.make(name, 10, waiting[name]) for name in names)), strict=True
        ):
            error = batched.future.exception()
            if isinstance(error, Paused):
                waiting[name] = batched.codes
                continue
            del waiting[name]
            if error is None:
                done[name] = batched
            else:
                blamed.append(name)
    assert blamed == ["c"]
    assert sorted(done) == ["a", "b", "d"]
    for name, batched in done.items():
        assert np.array_equal(batched.codes, (await Songs(Engine(1), executor).make(name, 10)).codes)


async def test_the_batch_grows_again_after_memory_ran_out(executor: Executor) -> None:
    songs = Songs(Engine(4, room=1), executor)
    await asyncio.gather(*(songs.make(name, 5) for name in "abcd"))
    low = songs.batch.limit
    assert low < 4
    songs.engine.room = 99
    for name in "efgh":
        await songs.make(name, 5)
    assert songs.batch.limit == 4


async def test_a_song_leaves_the_batch_even_where_nothing_can_be_freed(executor: Executor) -> None:
    songs = Songs(Engine(2, poison="a"), executor)
    songs.engine.error = DeviceBroken("illegal memory access")

    def drop(song_id: str) -> None:
        raise DeviceBroken("and it stays broken")

    songs.engine.drop = drop  # type: ignore[method-assign]
    async with asyncio.timeout(30):
        makings = await asyncio.gather(songs.make("a", 5), songs.make("b", 5))
    assert [type(batched.future.exception()) for batched in makings] == [DeviceBroken] * 2


class Pausing(Songs):
    """Makes songs that are all paused at their fifth frame."""

    async def paused(self, name: str, returns: bool = True) -> BatchedSong:
        def pause(batched: BatchedSong) -> None:
            self.contexts[name].pause = len(batched.frames) == 5

        batched = await self.make(name, 20, on_frame=pause, returns=returns)
        assert isinstance(batched.future.exception(), Paused)
        return batched


async def test_paused_songs_are_parked_with_all_their_frames(executor: Executor) -> None:
    songs = Pausing(Engine(2), executor)
    for batched in await asyncio.gather(songs.paused("a"), songs.paused("b")):
        assert batched.codes.shape == (8, 5)
        assert np.array_equal(songs.engine.parked[batched.job_id], batched.codes)
    assert songs.turn.booked == set()


async def test_songs_that_will_not_come_back_are_not_parked(executor: Executor) -> None:
    songs = Pausing(Engine(1), executor)
    await songs.paused("a", returns=False)  # the worker shuts down
    await songs.make("b", 10)  # it has ended
    for trouble in (JobStopped("cancelled"), LeaseLost("gone")):

        def stop(batched: BatchedSong, trouble: Exception = trouble) -> None:
            songs.contexts["c"].trouble = trouble

        assert (await songs.make("c", 20, on_frame=stop)).future.exception() is trouble
    assert songs.engine.parked == {}


@pytest.mark.parametrize(("error", "count"), [(DeviceFull("no memory left"), 2), (RuntimeError("poison"), 0)])
async def test_songs_that_leave_a_batch_that_is_too_large_are_parked_if_their_caches_are_sound(
    executor: Executor, error: Exception, count: int
) -> None:
    songs = Songs(Engine(4, poison="d"), executor)
    songs.engine.error = error
    made = await asyncio.gather(*(songs.make(name, 10) for name in "abcd"))
    left = {batched.job_id for batched in made if isinstance(batched.future.exception(), Paused)}
    assert len(left) >= 2
    assert len(songs.engine.parked) == count
    assert set(songs.engine.parked) <= left


@pytest.mark.parametrize("error", [DeviceFull("no memory for the copy"), RuntimeError("a fault of ours")])
async def test_a_song_that_cannot_be_parked_is_paused_all_the_same(executor: Executor, error: Exception) -> None:
    songs = Pausing(Engine(2), executor)
    songs.engine.park_error = error
    await asyncio.gather(songs.paused("a"), songs.paused("b"))
    assert songs.turn.booked == set()
    assert (await songs.make("c", 10)).future.exception() is None


async def test_what_was_parked_in_vain_is_freed_though_no_song_comes(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "PARKED_SECONDS", 0.01)
    songs = Pausing(Engine(1), executor)
    await songs.paused("a")
    assert await asyncio.to_thread(songs.engine.expired.wait, 30)
