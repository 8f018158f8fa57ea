"""Songs in the engine: one at a time, held for no longer than it may be, and nothing is left booked or running."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from services.codec_worker import decoding_loop, song_writer, stage
from services.codec_worker.decoding_loop import DecodingLoop
from services.codec_worker.device_queue import DeviceQueue
from services.codec_worker.engines.base import NOTHING_KEPT, DecodeState
from services.codec_worker.engines.trivial import TrivialCodec
from services.codec_worker.part_store import NewPart, _next_number
from services.codec_worker.song_in_work import SongInWork
from services.codec_worker.song_stream import SavedDecode, SongStream
from services.codec_worker.song_writer import FileBuilder, SongWriter
from services.codec_worker.stage import DecodeStage, _End
from services.codec_worker.token_fetch import Tokens
from shared.audio.flac import stream_header
from shared.audio.peaks import Peaks
from shared.audio.tags import SongTags
from shared.device.ledger import DeviceLedger
from shared.device.offload_phases import Phase, Turn
from shared.errors import LeaseLost, ObjectError, SongError
from shared.model.codec_windows import CodecWindows
from shared.schema.job import AudioPart, Decode, Job
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from shared.storage.token_file import TokenMeta
from shared.worker.signals import JobStopped, Paused
from shared.worker.throughput import Throughput

RATE = TrivialCodec.sample_rate
FRAMES = 130  # three windows
CODES = np.random.default_rng(0).integers(0, 64, (8, FRAMES), dtype=np.int16)
JOB = Job(job_id="a", tenant="local", request=GenerateRequest(lyrics="la"), created_at=1.0)
ENGINE = TrivialCodec(0, windows=CodecWindows(50, 40))


class Held:
    """Replacement of a held lease."""

    fencing_token = 1

    def __init__(self) -> None:
        self.lost = False

    def check(self) -> None:
        if self.lost:
            raise LeaseLost("the lease is lost")

    async def enter(self, phase: Phase) -> None:
        """Every phase may be entered."""


class Parts:
    """Replacement of a `PartStore`: stores a part whenever it may."""

    def __init__(self) -> None:
        self.parts: tuple[AudioPart, ...] = ()
        self.may_store = asyncio.Event()
        self.may_store.set()
        self.error: Exception | None = None

    async def add(self, new: NewPart) -> None:
        await self.may_store.wait()
        if self.error is not None:
            raise self.error
        self.parts += (AudioPart(key=str(len(self.parts)), size=len(new.data), samples=new.samples),)


class Bench:
    """Songs on one engine, with replacements of all that is around them."""

    def __init__(self, folder: Path) -> None:
        self.ledger = DeviceLedger(folder / "device", "codec.me", 10 * TrivialCodec.work_bytes)
        self.held = Held()
        self.turn = Turn(self.held, "codec", self.ledger)  # type: ignore[arg-type]
        self.executor = ThreadPoolExecutor(1)
        self.dry_in: dict[str, float] = {}
        self.live_songs = 0
        self.in_live_lane = {"a"}
        self.loop = DecodingLoop(ENGINE, Throughput())
        self.events: list[Any] = []

    async def open(self) -> None:
        for phase in (Phase.SWAP, Phase.DECODE):
            await self.turn.enter(phase)

    def context(self, job_id: str) -> Any:
        paused, stopped = threading.Event(), threading.Event()

        def check() -> None:
            self.turn.check_work()
            if stopped.is_set():
                raise JobStopped("cancelled")

        def check_pause() -> None:
            if paused.is_set():
                raise Paused("the device goes to another worker")

        return SimpleNamespace(
            job=SimpleNamespace(job_id=job_id),
            message=SimpleNamespace(subject=f"jobs.dec.{job_id}"),
            turn=self.turn,
            check=check,
            check_pause=check_pause,
            pause=paused.set,
            stop=stopped.set,
            progress=lambda *_, **__: None,
            publish=self.events.append,
            off_device=asyncio.Event(),
        )

    @property
    def worker(self) -> Any:
        async def in_engine(call: Callable[[], Any]) -> Any:
            return await asyncio.get_running_loop().run_in_executor(self.executor, call)

        async def consumer_info(*_: object) -> Any:
            return SimpleNamespace(num_pending=self.live_songs)

        async def stream_info(*_: object, subjects_filter: str) -> Any:
            assert subjects_filter == "jobs.live.*"
            subjects = {f"jobs.live.{job_id}": 1 for job_id in self.in_live_lane}
            return SimpleNamespace(state=SimpleNamespace(subjects=subjects))

        async def retry(call: Callable[[], Any], *_: object) -> Any:
            return await call()

        return SimpleNamespace(
            in_engine=in_engine,
            retry=retry,
            memory_used=lambda: 0,
            count_progress=lambda: None,
            draining=SimpleNamespace(active=False),
            listeners=SimpleNamespace(dry_in=self.dry_in.get),
            nc=SimpleNamespace(jetstream=lambda: SimpleNamespace(consumer_info=consumer_info, stream_info=stream_info)),
            store=SimpleNamespace(get=None),
        )

    def song(self, job_id: str = "a", *, ended: bool = True, frames: int = FRAMES) -> Any:
        """A `SongInWork`; tests change what they like of it."""
        header = stream_header(RATE, SongTags.of(JOB.request))
        saved = SavedDecode(
            engine="", state=DecodeState(seed=1), header=header, rest=np.zeros((0, 2), np.int16), peaks=Peaks(RATE)
        )
        parts: Any = Parts()
        record: Any = None
        return SongInWork(
            context=self.context(job_id),
            worker=self.worker,
            record=record,
            tokens=Tokens("k", CODES[:, :frames], TokenMeta(job_id="a", model="m", seed=0, ended=ended)),
            kept=NOTHING_KEPT,
            state=saved.state,
            stream=SongStream(saved, RATE),
            parts=parts,
            sample_rate=RATE,
        )

    async def run(self, song: Any) -> int:
        """Decode a song; returns how many parts were stored."""
        await self.loop.run(song, SongWriter(song.stream, song.parts, None, flac=True))
        return len(song.parts.parts)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    before = asyncio.all_tasks()  # those of other files' servers may be among them
    bench = Bench(tmp_path)
    await bench.open()
    yield bench
    assert not bench.ledger.residents(), "something is still booked on the device"
    assert len(asyncio.all_tasks() - before) <= 1, "something goes on in the background"  # this one is new
    bench.executor.shutdown()
    bench.ledger.close()


async def test_a_song_is_decoded_to_its_end_and_leaves_the_device_before_it_is_stored(bench: Bench) -> None:
    song = bench.song()
    song.parts.may_store.clear()
    running = asyncio.create_task(bench.run(song))
    await song.context.off_device.wait()
    assert not bench.ledger.residents()
    assert not running.done()
    song.parts.may_store.set()
    assert await running == 2
    assert [event.stage for event in bench.events] == ["decoding", "storing"]


async def test_a_song_that_goes_on_is_decoded_as_far_as_it_is_final_and_nothing_is_told(bench: Bench) -> None:
    song = bench.song(ended=False, frames=100)
    assert await bench.run(song) == 2
    assert (song.state.window, song.state.taken) == (2, 90)
    assert not bench.events
    assert await bench.run(song) == 2, "there was nothing more"


async def test_a_paused_song_is_stored_off_the_device_before_it_goes_back(bench: Bench) -> None:
    song = bench.song()
    song.parts.may_store.clear()
    song.context.publish = lambda _: song.context.pause()  # in the first window
    running = asyncio.create_task(bench.run(song))
    await song.context.off_device.wait()
    assert not running.done(), "it went back without its window"
    song.parts.may_store.set()
    with pytest.raises(Paused):
        await running
    assert len(song.parts.parts) == song.state.window == 1


async def test_a_store_that_is_slower_than_the_codec_costs_no_time_on_the_device(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(song_writer, "_BACKLOG", 1)
    monkeypatch.setattr(song_writer, "_PATIENCE", -1.0)
    song = bench.song(ended=False)
    song.parts.may_store.clear()
    running = asyncio.create_task(bench.run(song))
    await song.context.off_device.wait()
    assert not bench.ledger.residents()
    song.parts.may_store.set()
    with pytest.raises(Paused, match="not stored as fast"):
        await running
    assert len(song.parts.parts) == 2, "what was decoded was stored all the same"


async def test_a_song_waits_a_moment_for_the_store_and_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(song_writer, "_BACKLOG", 0)
    monkeypatch.setattr(song_writer, "_PATIENCE", 1000.0)
    assert await bench.run(bench.song()) == 2


@pytest.mark.parametrize("error", [JobStopped("another worker's"), SongError("not finite")])
async def test_what_goes_wrong_off_the_device_ends_the_decoding(bench: Bench, error: Exception) -> None:
    song = bench.song()
    song.parts.error = error
    with pytest.raises(type(error)):
        await bench.run(song)


@pytest.mark.parametrize("harm", ["lease", "cancelled"])
async def test_a_song_that_has_to_stop_stops_before_the_next_step(bench: Bench, harm: str) -> None:
    song = bench.song()

    def begun(_: object) -> None:
        if harm == "lease":
            bench.held.lost = True
        else:
            song.context.stop()

    song.context.publish = begun
    with pytest.raises(LeaseLost if harm == "lease" else JobStopped):
        await bench.run(song)
    assert song.context.off_device.is_set()
    assert song.state.window == 0
    bench.held.lost = False


async def test_a_song_without_a_listener_makes_place_at_a_window_for_one_in_the_queue(bench: Bench) -> None:
    bench.live_songs = 1
    song = bench.song()
    with pytest.raises(Paused, match="listens"):
        await bench.run(song)
    assert song.state.window == 1, "each turn gets a song further"
    song = bench.song()
    song.context.message.subject = "jobs.live.a"  # its listener has left: given back, it would come first again
    assert not await bench.loop.run(song, SongWriter(song.stream, song.parts, None, flac=True))
    assert song.state.window == 1
    bench.dry_in["a"] = 0.0
    assert await bench.run(bench.song()) == 2, "a song with a listener stays"
    bench.dry_in.clear()
    assert await bench.run(bench.song(ended=False, frames=50)) == 1, "nothing of it is left to make place for"


async def test_songs_with_listeners_take_turns_at_their_windows_where_others_wait_in_the_queue(bench: Bench) -> None:
    bench.live_songs = 1
    bench.dry_in = {"a": 0.0, "b": 1.0}
    assert await bench.run(bench.song()) == 2, "b waits for its tokens, not for the codec"
    bench.in_live_lane.add("b")
    bench.events.clear()
    for others, ended in (({"b": 1.0}, True), ({"b": 1.0}, False), ({"b": 3.3}, True)):
        bench.dry_in = {"a": 0.0, **others}
        song = bench.song(ended=ended)
        writer = SongWriter(song.stream, song.parts, None, flac=True)
        assert not await bench.loop.run(song, writer), "all of it was decoded, and others ran dry"
        # A window is 3.2 s: whoever runs dry after that waits for another.
        assert len(song.parts.parts) == song.state.window == (1 if others["b"] < 3.2 else 2)
    assert "storing" not in [event.stage for event in bench.events]
    bench.live_songs = 0
    assert await bench.run(bench.song()) == 2, "nobody waits"


async def test_a_song_in_hand_whose_listener_runs_dry_sooner_goes_first(bench: Bench) -> None:
    bench.dry_in["b"] = 0.0
    order: list[str] = []
    songs = [bench.song("a"), bench.song("b")]
    for song in songs:
        song.on_step = lambda *_, name=song.job_id: order.append(name)
    assert await asyncio.gather(*(bench.run(song) for song in songs)) == [2, 2]
    assert "".join(dict.fromkeys(order)) == "ab"
    assert order.index("b") < len(order) - 1 - order[::-1].index("a"), "b waited for all of a"
    assert order[-1] == "a", "b made place for a song without a listener"


def test_who_has_the_engine_gives_way_to_the_drier_listener_only() -> None:
    queue, dry_in = DeviceQueue(), {"b": 5.0, "c": 9.0}
    assert not queue.is_pressed(None, dry_in.get), "nobody waits"
    queue._waiting += ["a", "b", "c"]
    for own, pressed in ((None, True), (4.0, False), (5.0, False), (6.0, True)):
        assert queue.is_pressed(own, dry_in.get) == pressed
    assert not queue.is_pressed(None, lambda _: None)


class File:
    """Replacement of a `SongFile` that is full, or takes everything."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.finished = False

    def add(self, _: object) -> None:
        if self.error is not None:
            raise self.error

    def add_part(self, *_: object) -> None:
        self.add(None)

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("error", [None, OSError("No space left on device")])
async def test_a_full_disk_leaves_nothing_booked(bench: Bench, error: Exception | None) -> None:
    file: Any = File(error)
    song = bench.song()
    builder = FileBuilder(file, (), song.context, song.worker)
    await bench.loop.run(song, SongWriter(song.stream, song.parts, builder, flac=True))
    if error is not None:
        with pytest.raises(OSError, match="No space left"):
            await builder.finish()
    else:
        await builder.finish()
    assert file.finished == (error is None)
    await builder.abandon()


async def test_parts_of_earlier_turns_are_fetched_while_the_song_is_decoded_and_a_missing_one_is_reported(
    bench: Bench,
) -> None:
    file: Any = File()
    song = bench.song()

    async def missing(_: str) -> bytes:
        raise ObjectError("there is no such object")

    song.worker.store.get = missing
    builder = FileBuilder(file, (AudioPart(key="k", size=1, samples=1),), song.context, song.worker)
    await bench.loop.run(song, SongWriter(song.stream, song.parts, builder, flac=True))
    with pytest.raises(ObjectError, match="no such object"):
        await builder.finish()
    await builder.abandon()
    assert decoding_loop._LABEL not in [resident.label for resident in bench.ledger.residents()]


async def test_a_song_that_makes_place_before_its_end_does_not_fetch_its_parts(bench: Bench) -> None:
    fetched = list[str]()

    async def get(key: str) -> bytes:
        fetched.append(key)
        return b""

    part = AudioPart(key="k", size=1, samples=1)
    song = bench.song()  # three windows
    song.worker.store.get = get
    for live_songs, wanted in ((1, []), (0, ["k"])):
        bench.live_songs = live_songs
        file: Any = File()
        builder = FileBuilder(file, (part,), song.context, song.worker)
        with nullcontext() if wanted else pytest.raises(Paused):
            await bench.loop.run(song, SongWriter(song.stream, song.parts, builder, flac=True))
            await builder.finish()
        await builder.abandon()
        assert fetched == wanted


def test_no_part_has_the_key_of_another_that_was_dropped() -> None:
    part = AudioPart(key="audio/a/1.7.part", size=1, samples=1)
    assert _next_number(Decode()) == 0
    assert _next_number(Decode(parts=(part,), sample_rate=RATE)) == 8
    assert _next_number(Decode(parts=(), sample_rate=RATE)) > 8, "decoding began again"


@pytest.mark.parametrize(
    ("end", "saved_frames", "queued"),
    [
        (None, 372, False),  # what could be decoded was
        (None, 692, True),  # another window is whole by now
        (_End.MADE_PLACE, 372, True),  # whether or not there is more than before
        (_End.COMPLETED, 692, False),
    ],
)
async def test_a_song_is_queued_again_where_more_of_it_can_be_decoded(
    end: _End | None, saved_frames: int, queued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = msgspec.structs.replace(JOB, status="generating", tokens_key="k", saved_frames=372)
    part = AudioPart(key="audio/a/1.0.part", size=1, samples=1)
    now = msgspec.structs.replace(claimed, saved_frames=saved_frames, decode=Decode(parts=(part,)))
    again = list[str]()

    async def queue_windows(_: object, job: Job, *, listened: bool) -> None:
        again.append(f"{job.job_id} {listened}")

    async def get(*_: object) -> Job:
        return now

    async def retry(call: Callable[[], Any]) -> Any:
        return await call()

    monkeypatch.setattr(stage, "queue_windows", queue_windows)
    decoder = DecodeStage(ENGINE, "model", Settings(engine="trivial"))
    if end is not None:
        decoder._ends["a"] = end
    listeners = SimpleNamespace(dry_in=lambda _: 1.0)
    worker: Any = SimpleNamespace(
        nc=None, jobs=SimpleNamespace(get=get), retry=retry, listeners=listeners, models_stay=False
    )
    context: Any = SimpleNamespace(job=claimed)
    await decoder.settled(context, worker)
    assert again == (["a True"] if queued else [])
    assert not decoder._ends
