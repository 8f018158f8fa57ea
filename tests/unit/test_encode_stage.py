"""The encoder's stage before its turn: when it can work at all; and chunks as the encoders count and number them."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.codec_worker import encode_stage, recording_audio
from services.codec_worker.encode_stage import EncodeStage
from services.codec_worker.encoder.chunks import FRAMES, chunk_count, frame_count, samples_of, whole_frames
from services.codec_worker.encoder.recording import Recording
from services.codec_worker.encoder.resampling import Resampler
from services.codec_worker.engines.encoder import PARTS, NativeEncoder
from services.codec_worker.engines.trivial import TrivialEncoder
from services.codec_worker.recording_audio import RecordedAudio
from shared.device.info import Device
from shared.device.memory_plan import Placement
from shared.errors import ConfigError
from shared.model.checkpoint import open_checkpoint
from shared.model.encoder_sizes import chunks_at_once, encoder_bytes, encoder_work
from shared.schema.listening import Listening
from shared.settings import Settings
from shared.worker.listeners import Listeners
from shared.worker.signals import Paused
from tests.integration.recorded import RATE, recording_of

GOLDEN = open_checkpoint(Path(__file__).parents[1] / "golden/encoder/ckpt")
PLACE = Placement(Device("cpu", "cpu", "card", "CPU", 2**40), "float32", 1, True, 2**30)
JS: Any = None


class Engine(TrivialEncoder):
    """Counts how often its weights are read."""

    loads = 0
    error: Exception | None = None

    def load(self) -> None:
        self.loads += 1
        if self.error is not None:
            raise self.error


def stage_of(engine: TrivialEncoder, place: Placement = PLACE) -> EncodeStage:
    return EncodeStage(engine, "model", Settings(), place, host_bytes=3 * 10**9)


async def test_weights_are_read_when_a_recording_waits_and_memory_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, missing = Engine(0), 10**9
    monkeypatch.setattr(encode_stage, "shortage", lambda needed: missing)
    stage = stage_of(engine)
    stage.load()
    said = await stage.obstacle(JS)
    assert said is not None
    assert said.startswith("recordings wait: the encoder needs 3.00 GB of host memory, and 1.00 GB of that are missing")
    assert engine.loads == 0
    missing = 0
    assert await stage.obstacle(JS) is None
    missing = 10**9
    assert await stage.obstacle(JS) is None, "they are read already"
    assert engine.loads == 1


@pytest.mark.parametrize(
    "error",
    [ConfigError("a tensor is missing"), FileNotFoundError("the folder is gone"), RuntimeError("no memory")],
)
async def test_weights_that_cannot_be_read_are_a_problem_and_end_no_process(error: Exception) -> None:
    engine = Engine(0)
    engine.error = error
    stage = stage_of(engine)
    for _ in range(2):
        assert await stage.obstacle(JS) == f"recordings wait: {error}; then restart this worker"
    assert engine.loads == 1


@pytest.mark.parametrize(
    ("stays", "advice"),
    [
        (False, "a device with more memory holds it"),
        (True, "a device with more memory holds it, HEARTMULA_SEQUENTIAL_OFFLOAD=true leaves more"),
    ],
)
async def test_an_encoder_that_never_fits_says_what_to_change(stays: bool, advice: str) -> None:
    needed = TrivialEncoder.weight_bytes + TrivialEncoder.work_bytes
    assert stage_of(Engine(0), replace(PLACE, share=needed, stays=stays)).spec.refusal is None
    small = stage_of(Engine(0), replace(PLACE, share=needed - 1, stays=stays))
    assert (small.spec.refusal or "").endswith(advice)
    assert await small.obstacle(JS) is None, "its recordings fail, they do not wait"


async def test_recordings_wait_for_room_on_the_disk_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = recording_of(b"", seconds=100)
    needed, free, now = 100 * RATE * 4, 0, 0.0
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**6, free=free))
    monkeypatch.setattr(encode_stage, "time", SimpleNamespace(monotonic=lambda: now))
    stage = EncodeStage(Engine(0), "model", Settings(data_dir=tmp_path), PLACE, host_bytes=0)
    assert await stage.obstacle(JS) is None
    words = "unpacking a recording takes 0.00 GB of the data folder's disk, and 0.00 GB are missing: free some room"
    with pytest.raises(OSError, match=words):
        stage._require_room(job, tmp_path)
    assert await stage.obstacle(JS) == f"recordings wait: {words}"
    now += 1000
    assert await stage.obstacle(JS) is None, "it may have been deleted, and others need less"
    with pytest.raises(OSError, match=words):
        stage._require_room(job, tmp_path)
    free = needed + 20_000 - 1
    assert await stage.obstacle(JS) is not None, "two hundredths of the disk are left to others"
    free += 1
    assert await stage.obstacle(JS) is None
    stage._require_room(job, tmp_path)


async def test_a_transfer_from_a_slow_store_ends_when_the_device_should_be_left(tmp_path: Path) -> None:
    class Reader:
        """A file that never ends."""

        closed = False

        async def __aiter__(self) -> Any:
            while True:
                yield b"fLaC"

        def close(self) -> None:
            self.closed = True

    async def open_(_: str) -> Reader:
        return reader

    def check() -> None:
        if next(looks) == 3:
            raise Paused("the device goes to another worker")

    reader, looks = Reader(), itertools.count()
    store: Any = SimpleNamespace(open=open_)
    with pytest.raises(Paused):
        await recording_audio.fetch_audio(recording_of(b"", seconds=1), store, tmp_path, check)
    assert reader.closed


async def test_a_listener_who_runs_dry_soon_ends_a_turn_whatever_the_song() -> None:
    listeners = Listeners()
    worker: Any = SimpleNamespace(listeners=listeners, away=lambda: 0.0)
    stage = stage_of(Engine(0))
    assert await stage.dry_in(worker) is None
    listeners.add(Listening(job_id="a", gateway="g", buffered=1000, listeners=1))
    assert await stage.dry_in(worker) is None
    listeners.add(Listening(job_id="b", gateway="g", buffered=1, listeners=1))
    assert await stage.dry_in(worker) == pytest.approx(1, abs=1)


async def test_each_turn_brings_a_recording_further_by_a_chunk_before_it_ends() -> None:
    """However early it should: else a recording that takes long to fetch would never be encoded."""
    stage, saved = stage_of(Engine(0)), []

    async def in_engine(call: Callable[[], Any]) -> Any:
        return call()

    async def save(codes: np.ndarray) -> None:
        saved.append(codes.shape[1])

    def paused() -> None:
        raise Paused("the device goes to another worker")

    async def encode(token: int, codes: np.ndarray) -> None:
        turn = SimpleNamespace(fencing_token=token, place_work=lambda *_: None, remove=lambda _: None)
        context: Any = SimpleNamespace(turn=turn, check=lambda: None, check_pause=paused)
        await stage._encode(context, worker, tokens, audio, codes)

    draining = SimpleNamespace(active=False)
    worker: Any = SimpleNamespace(in_engine=in_engine, count_progress=lambda: None, draining=draining)
    tokens: Any = SimpleNamespace(save=save)
    audio = RecordedAudio(np.zeros((1, 95 * 8000), np.float32), 8000)
    none = np.zeros((8, 0), np.int16)
    with pytest.raises(Paused):
        await encode(1, none)
    assert saved == [FRAMES]
    with pytest.raises(Paused):  # another one, in the same turn
        await encode(1, none)
    assert saved == [FRAMES]
    with pytest.raises(Paused):
        await encode(2, np.zeros((8, FRAMES), np.int16))
    assert saved == [FRAMES, 2 * FRAMES]
    draining.active = True
    with pytest.raises(Paused, match="shutting down"):
        await encode(3, none)
    assert saved == [FRAMES, 2 * FRAMES]


@given(st.integers(1, 30_000_000), st.sampled_from([8000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000, 47_999]))
def test_length_alone_tells_chunks_and_frames(samples: int, rate: int) -> None:
    assert samples_of(samples, rate) == Resampler(rate, 24_000).length(samples)
    if samples < 2_000_000:
        recording = Recording(np.zeros((1, samples), np.float32), rate)
        length = samples_of(samples, rate)
        found = (chunk_count(length), frame_count(length), whole_frames(length))
        assert found == (recording.chunks, recording.frames, recording.whole_frames)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_trivial_encoder_goes_on_at_any_chunk(first: int) -> None:
    audio = np.random.default_rng(0).standard_normal((2, 70 * 8000), np.float32)
    steps = list(TrivialEncoder(0).encode(audio, 8000))
    whole = np.concatenate([step.codes for step in steps if step.codes is not None], axis=1)
    assert whole.shape == (8, frame_count(70 * 24_000))
    rest = list(TrivialEncoder(0).encode(audio, 8000, first=first))
    assert [(step.done, step.total) for step in rest] == [(n, 3 - first) for n in range(1, 4 - first)]
    made = np.concatenate([step.codes for step in rest if step.codes is not None], axis=1)
    assert np.array_equal(made, whole[:, first * FRAMES :])


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_the_native_encoder_goes_on_at_any_chunk_in_batches_of_any_size(
    batch: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = NativeEncoder(GOLDEN, "cpu", batch=batch)

    def parts(recording: Recording, chunks: range) -> Any:
        yield from [None] * (len(PARTS) - 1)
        yield np.concatenate([np.full((8, recording.frames_of(chunk)), chunk, np.int16) for chunk in chunks], axis=1)

    monkeypatch.setattr(engine, "_parts", parts)
    recording = Recording(np.zeros((1, 140 * 24_000), np.float32), 24_000)
    steps = list(engine._encode(recording, first))
    codes = np.concatenate([step.codes for step in steps if step.codes is not None], axis=1)
    wanted = np.repeat(np.arange(5), FRAMES)[first * FRAMES : recording.frames]
    assert np.array_equal(codes[0], wanted)
    batches = -(-(5 - first) // batch)
    assert (len(steps), steps[-1].done, steps[-1].total) == (batches * len(PARTS),) * 3


def test_a_device_encodes_as_many_chunks_at_once_as_its_share_holds() -> None:
    config, codec = GOLDEN.encoder, GOLDEN.codec
    assert config is not None
    weights = encoder_bytes(config, codec)
    assert chunks_at_once(config, codec, weights, most=4) == 1, "the stage says that nothing fits"
    for count in (1, 2, 3):
        share = weights + encoder_work(config, codec, count)
        found = chunks_at_once(config, codec, share, most=4)
        assert found >= count
        assert encoder_work(config, codec, found) <= share - weights
    assert chunks_at_once(config, codec, 2**50, most=4) == 4
