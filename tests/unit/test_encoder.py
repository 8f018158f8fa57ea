"""The encoder's thread: the file of a song that is written at once, bounded memory, and an end whatever happens."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.codec_worker.encoder import QUEUE, encoding
from shared.audio.files import AudioWriter, SongTags, read_audio
from shared.audio.peaks import peaks_of
from shared.errors import SongError
from shared.schema.request import AudioFormat
from shared.worker.signals import JobStopped, Paused

RATE = 8000
TAGS = SongTags(title="A song", tags="piano", lyrics="la", seed=1)
SONG = np.random.default_rng(0).uniform(-0.5, 0.5, (20 * RATE, 2)).astype(np.float32)
STRETCHES = np.array_split(SONG, 30)


class Gate:
    """Stands in for `AudioWriter.write`: lets the encoder pass as often as it is opened, or fail."""

    def __init__(self) -> None:
        self.passes = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.error: Exception | None = None
        self.begun = self.written = 0

    def write(self, _audio: np.ndarray) -> None:
        self.begun += 1
        self.entered.release()
        assert self.passes.acquire(timeout=5), "the gate stayed closed"
        if self.error is not None:
            raise self.error
        self.written += 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(AudioWriter, "write", lambda _self, audio: gate.write(audio))
    return gate


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Neither a thread nor an open file outlives a test."""
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("encoder")]
    assert not [link for link in Path("/proc/self/fd").iterdir() if _target(link).endswith(".part-song")]


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # of this listing itself
        return ""


@pytest.mark.parametrize("audio_format", ["flac", "wav", "mp3"])
def test_the_file_and_the_peaks_are_those_of_a_song_written_at_once(tmp_path: Path, audio_format: AudioFormat) -> None:
    with AudioWriter(tmp_path / "whole", audio_format, RATE, TAGS) as writer:
        writer.write(SONG)
    with encoding(tmp_path / "song.part-song", audio_format, RATE, TAGS) as encoder:
        for stretch in STRETCHES:
            encoder.write(stretch)
        peaks = encoder.finish()
    assert encoder.samples == len(SONG)
    assert peaks == peaks_of([SONG], RATE)
    whole, made = (np.concatenate(list(read_audio(tmp_path / name))) for name in ("whole", "song.part-song"))
    assert np.array_equal(made, whole)
    if audio_format != "mp3":
        assert (tmp_path / "song.part-song").read_bytes() == (tmp_path / "whole").read_bytes(), "tags included"


def encode(folder: Path, stretches: list[np.ndarray]) -> bytes:
    with encoding(folder / "song.part-song", "wav", RATE, TAGS) as encoder:
        for stretch in stretches:
            encoder.write(stretch)
        return encoder.finish()


def test_the_engine_goes_on_while_a_stretch_is_encoded_and_no_more_than_a_few_wait(tmp_path: Path, gate: Gate) -> None:
    handed_in = threading.Semaphore(0)

    def engine() -> None:
        with encoding(tmp_path / "song.part-song", "wav", RATE, TAGS) as encoder:
            for stretch in STRETCHES:
                encoder.write(stretch)
                handed_in.release()
            encoder.finish()

    thread = threading.Thread(target=engine)
    thread.start()
    assert gate.entered.acquire(timeout=30)  # the first is being written, and stays so
    for _ in range(QUEUE):
        assert handed_in.acquire(timeout=30)
    assert not handed_in.acquire(timeout=0.2), "the engine waits"
    gate.passes.release()
    assert handed_in.acquire(timeout=30)
    gate.passes.release(len(STRETCHES))
    thread.join(30)
    assert gate.written == len(STRETCHES)


@pytest.mark.parametrize("stretches", [1, len(STRETCHES)])
def test_a_full_disk_reaches_the_song_before_its_end_or_with_it(tmp_path: Path, gate: Gate, stretches: int) -> None:
    gate.error = OSError("No space left on device")
    gate.passes.release(len(STRETCHES))
    with pytest.raises(OSError, match="No space left"):
        encode(tmp_path, STRETCHES[:stretches])
    assert gate.begun <= QUEUE + 1, "no more than those that waited"


def test_audio_that_is_not_finite_ends_the_song(tmp_path: Path) -> None:
    with pytest.raises(SongError, match="not finite"):
        encode(tmp_path, [np.full((100, 2), np.nan, np.float32)])


@pytest.mark.parametrize("signal", [JobStopped("cancelled"), Paused("shutting down"), KeyboardInterrupt()])
def test_a_song_that_is_given_up_is_not_encoded_to_its_end(tmp_path: Path, gate: Gate, signal: BaseException) -> None:
    def give_up() -> None:
        with encoding(tmp_path / "song.part-song", "flac", RATE, TAGS) as encoder:
            for stretch in STRETCHES[:QUEUE]:
                encoder.write(stretch)
            assert gate.entered.acquire(timeout=30)
            gate.passes.release()  # the stretch that is being written comes to its end
            raise signal

    with pytest.raises(type(signal)):
        give_up()
    assert gate.written == 1
    assert gate.begun == 1, "none of those that waited"
