"""Audio files: readable, of the right length, tagged, and never made from audio that would crash an encoder."""

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args

import mutagen
import numpy as np
import pytest
import soundfile

from shared.audio.files import AudioWriter
from shared.audio.forms import plain
from shared.audio.pcm import pcm16
from shared.audio.reading import read_audio, sample_rate_of
from shared.audio.tags import SongTags
from shared.errors import ObjectError, SongError
from shared.schema.request import AudioFormat

TAGS = SongTags(title="Grüße 🎵", tags="pop,piano", lyrics="[Verse]\nHällo\nla la", seed=2**53 - 1)
RATE = 16000
FORMATS = get_args(AudioFormat)
LOSSY = ("mp3", "ogg")


def tone(seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return np.stack([0.5 * np.sin(880 * np.pi * time), 0.3 * np.sin(440 * np.pi * time)], axis=1).astype(np.float32)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_what_was_written_can_be_read(tmp_path: Path, audio_format: AudioFormat) -> None:
    path, audio = tmp_path / f"song.{audio_format}", tone(3.3)
    with AudioWriter(path, plain(audio_format), RATE, TAGS) as writer:
        for block in np.array_split(audio, 7):
            writer.write(block)
        writer.write(audio[:0])
    read, rate = soundfile.read(path)
    assert rate == RATE
    assert read.shape == audio.shape
    assert np.abs(read - audio)[:-2000].max() < (0.05 if audio_format in LOSSY else 1e-4)


@pytest.mark.parametrize("audio_format", ["flac", "ogg"])
def test_flac_and_ogg_carry_the_song(tmp_path: Path, audio_format: AudioFormat) -> None:
    path = tmp_path / f"song.{audio_format}"
    with AudioWriter(path, plain(audio_format), RATE, TAGS) as writer:
        writer.write(tone(0.1))
    tags = mutagen.File(path)
    assert tags["title"] == ["Grüße 🎵"]
    assert tags["genre"] == ["pop,piano"]
    assert tags["lyrics"] == ["[Verse]\nHällo\nla la"]
    assert tags["seed"] == [str(2**53 - 1)]


@pytest.mark.parametrize("audio_format", ["wav", "mp3"])
def test_wav_and_mp3_carry_the_song(tmp_path: Path, audio_format: AudioFormat) -> None:
    path = tmp_path / f"song.{audio_format}"
    with AudioWriter(path, plain(audio_format), RATE, TAGS) as writer:
        writer.write(tone(0.1))
    tags = mutagen.File(path).tags
    assert str(tags["TIT2"]) == "Grüße 🎵"
    assert str(tags["TCON"]) == "pop,piano"
    assert tags["USLT::und"].text == "[Verse]\nHällo\nla la"
    assert str(tags["TXXX:SEED"]) == str(2**53 - 1)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_louder_than_full_scale_is_clipped(tmp_path: Path, audio_format: AudioFormat) -> None:
    path = tmp_path / f"song.{audio_format}"
    with AudioWriter(path, plain(audio_format), RATE, TAGS) as writer:
        writer.write(4 * tone(0.5))
    read, _ = soundfile.read(path)
    assert np.abs(read).max() > 0.95
    if audio_format not in LOSSY:
        assert read[np.argmax(4 * tone(0.5)[:, 0]), 0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_audio_that_is_not_finite_fails_the_song(tmp_path: Path, bad: float) -> None:
    audio = tone(0.1)
    audio[5, 1] = bad
    with (
        pytest.raises(SongError, match="not finite"),
        AudioWriter(tmp_path / "song.mp3", plain("mp3"), RATE, TAGS) as writer,
    ):
        writer.write(audio)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Stand in for a full disk: no file of this process gets longer than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_a_full_disk_is_never_the_songs_fault(tmp_path: Path, audio_format: AudioFormat) -> None:
    path, audio = tmp_path / f"song.{audio_format}", tone(2)
    tags = SongTags(title=None, tags="pop", lyrics="la " * 3000, seed=1)  # longer than any padding for them
    with AudioWriter(path, plain(audio_format), RATE, tags) as writer:
        writer.write(audio)
    whole = path.stat().st_size
    for size in (0, 100, whole // 4, whole - 8500, whole - 1):  # opened, written to, tagged
        with (
            files_of_at_most(size),
            pytest.raises(OSError, match=r"could not be written|File too large"),
            AudioWriter(path, plain(audio_format), RATE, tags) as writer,
        ):
            writer.write(audio)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_audio_is_read_a_second_at_a_time_as_it_is_read_whole(tmp_path: Path, audio_format: AudioFormat) -> None:
    path = tmp_path / f"song.{audio_format}"
    with AudioWriter(path, plain(audio_format), RATE, TAGS) as writer:
        writer.write(tone(7.7))
    blocks = list(read_audio(path))
    assert {len(block) for block in blocks[:-1]} == {RATE}
    whole, _ = soundfile.read(path, dtype=blocks[0].dtype.name)
    assert np.abs(np.concatenate(blocks).astype(float) - whole).max() < 1e-6
    assert sample_rate_of(path) == RATE


@pytest.mark.parametrize("audio_format", FORMATS)
def test_whole_numbers_are_written_as_they_are_and_as_fractions_are(tmp_path: Path, audio_format: AudioFormat) -> None:
    path, audio = tmp_path / f"song.{audio_format}", tone(3)
    files = []
    for each in (audio, pcm16(audio)):
        with AudioWriter(path, plain(audio_format), RATE, TAGS) as writer:
            writer.write(each)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    read, _ = soundfile.read(path, dtype="int16")
    difference = np.abs(read.astype(int) - pcm16(audio))[:-2000].max()
    assert difference < (1600 if audio_format in LOSSY else 1)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_a_song_that_is_given_up_raises_nothing_of_its_own(tmp_path: Path, audio_format: AudioFormat) -> None:
    """Neither what it was given up for is hidden, nor does the file stay open; on a disk that became full too."""

    def give_up(error: Exception) -> None:
        with ExitStack() as disk, AudioWriter(tmp_path / "song", plain(audio_format), RATE, TAGS) as writer:
            writer.write(tone(1.5))
            disk.enter_context(files_of_at_most(1000))
            raise error

    for error in (KeyError("cancelled"), OSError("the store is away")):
        with pytest.raises(type(error)) as raised:
            give_up(error)
        assert raised.value is error
    with files_of_at_most(1000), pytest.raises(OSError, match="could not be written"):
        give_up(KeyError("cancelled"))
    assert not [link for link in Path("/proc/self/fd").iterdir() if link.exists() and link.resolve().name == "song"]


def test_damaged_audio_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "song.flac"
    path.write_bytes(b"no audio")
    with pytest.raises(ObjectError, match="cannot be read"):
        sample_rate_of(path)
    with pytest.raises(ObjectError, match="cannot be read"):
        list(read_audio(path))
