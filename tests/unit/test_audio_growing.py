"""An audio file is a stream while it grows, and comes out the same however its audio was cut."""

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import get_args

import mutagen
import numpy as np
import pytest
import soundfile
from mutagen.ogg import OggPage

from shared.audio.files import AudioWriter
from shared.audio.flac import BLOCK, encode_blocks, finished_header, stream_header
from shared.audio.forms import plain
from shared.audio.reading import read_audio
from shared.audio.tags import SongTags
from shared.schema.request import AudioFormat

FORMATS = get_args(AudioFormat)
TAGS = SongTags(title="Ein Lied", tags="pop", lyrics="la la\n" * 300, seed=7)
RATES = [48_000, 8000]
SECONDS = 7.3
MP3_DELAY = 1105  # samples before the music, in decoders that learn nothing of them: 576 of LAME's, 529 of their own
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg (Debian: ffmpeg) is missing")


def music(rate: int, seconds: float = SECONDS) -> np.ndarray:
    time = np.arange(round(seconds * rate))[:, None] / rate
    noise = np.random.default_rng(0).normal(0, 100, (len(time), 2))
    return (8000 * np.sin(2 * np.pi * (200 + 30 * time) * time * [1, 1.01]) + noise).astype(np.int16)


Cut = Callable[[np.ndarray], list[np.ndarray]]
CUTS: dict[str, Cut] = {
    "whole": lambda pcm: [pcm],
    "halves": lambda pcm: np.array_split(pcm, 2),
    "odd": lambda pcm: np.array_split(pcm, 101),
    "short first": lambda pcm: [pcm[:1], pcm[1:100], pcm[100:]],
    "random": lambda pcm: np.split(pcm, sorted(np.random.default_rng(3).integers(0, len(pcm), 40))),
}


def written(path: Path, audio_format: AudioFormat, rate: int, pieces: list[np.ndarray], tags: SongTags = TAGS) -> bytes:
    with AudioWriter(path, plain(audio_format), rate, tags) as writer:
        for piece in pieces:
            writer.write(piece)
    return path.read_bytes()


def decoded(file: bytes) -> np.ndarray:
    return np.concatenate(list(read_audio(BytesIO(file))))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("audio_format", FORMATS)
def test_every_cut_makes_the_same_bytes(tmp_path: Path, audio_format: AudioFormat, rate: int) -> None:
    pcm = music(rate)
    files = {name: written(tmp_path / name, audio_format, rate, cut(pcm)) for name, cut in CUTS.items()}
    assert {name for name, file in files.items() if file != files["whole"]} == set()


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("audio_format", FORMATS)
def test_the_samples_are_those_of_libsndfiles_own_file(tmp_path: Path, audio_format: AudioFormat, rate: int) -> None:
    """That file is written in one go, from the same 16-bit samples, and has no tags."""
    pcm, subtype = music(rate), {"mp3": "MPEG_LAYER_III", "ogg": "VORBIS"}.get(audio_format, "PCM_16")
    audio = pcm.astype(np.float32) / 32_768 if audio_format in ("mp3", "ogg") else pcm
    level = 0.4 if audio_format == "ogg" else None
    own = BytesIO()
    with soundfile.SoundFile(own, "w", rate, 2, subtype, format=audio_format.upper(), compression_level=level) as file:
        for start in range(0, len(audio), rate):
            file.write(audio[start : start + rate])
    ours = written(tmp_path / "song", audio_format, rate, CUTS["odd"](pcm))
    assert np.array_equal(decoded(ours), decoded(own.getvalue()))
    assert len(decoded(ours)) == len(pcm)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("audio_format", FORMATS)
def test_bytes_once_written_stay_and_sound_as_they_will_at_the_end(
    tmp_path: Path, audio_format: AudioFormat, rate: int
) -> None:
    path, pcm = tmp_path / "song", music(rate)
    states = []
    with AudioWriter(path, plain(audio_format), rate, TAGS) as writer:
        states.append((0, path.read_bytes()))
        for count, piece in enumerate(np.array_split(pcm, 20), start=1):
            writer.write(piece)
            states.append((count * len(piece), path.read_bytes()))
    whole, header = path.read_bytes(), writer.header_size
    samples = decoded(whole)
    assert len(states[0][1]) == header
    for given, state in states:
        assert state[:header] == states[0][1]
        assert state[header:] == whole[header : len(state)]
        if given <= 2 * rate:
            continue
        heard = decoded(state)
        if audio_format == "mp3":
            heard = heard[MP3_DELAY:]
        assert np.array_equal(heard, samples[: len(heard)])
        waits = {"flac": BLOCK, "wav": 1}.get(audio_format, 2 * rate)  # samples that wait to be encoded
        assert len(heard) > given - waits or audio_format == "mp3"  # libsndfile guesses how long that file is


@pytest.mark.parametrize("audio_format", FORMATS)
def test_tags_come_first(tmp_path: Path, audio_format: AudioFormat) -> None:
    """And not behind the audio, where a player that plays to the end would take them for music."""
    path = tmp_path / "song"
    with AudioWriter(path, plain(audio_format), 8000, TAGS) as writer:
        writer.write(music(8000, 2))
        growing = path.read_bytes()
    for file in (growing, path.read_bytes()):
        tags = mutagen.File(BytesIO(file)).tags
        assert "Ein Lied" in str(tags["TIT2" if audio_format in ("wav", "mp3") else "title"])
        assert file.find(b"Ein Lied") < 100 or audio_format in ("flac", "ogg")
        assert file.find(b"Ein Lied") < 5000
        assert file.count(b"Ein Lied") == 1


def test_sizes_of_a_wav_file_are_unknown_while_it_grows_and_right_at_its_end(tmp_path: Path) -> None:
    path, pcm = tmp_path / "song", music(8000, 1)
    with AudioWriter(path, plain("wav"), 8000, TAGS) as writer:
        writer.write(pcm)
        growing = path.read_bytes()
    finished = path.read_bytes()
    sizes = slice(4, 8), slice(writer.header_size - 4, writer.header_size)
    assert [growing[size] for size in sizes] == [b"\xff\xff\xff\xff"] * 2
    assert [int.from_bytes(finished[size], "little") for size in sizes] == [len(finished) - 8, pcm.nbytes]
    assert finished[writer.header_size :] == pcm.tobytes()


@pytest.mark.parametrize("lyrics", ["", "la", "la la\n" * 20_000])
def test_pages_of_an_ogg_file_are_numbered_without_a_gap(tmp_path: Path, lyrics: str) -> None:
    tags = SongTags(title="Ein Lied", tags="pop", lyrics=lyrics, seed=7)
    file = BytesIO(written(tmp_path / "song", "ogg", 48_000, [music(48_000, 3)], tags))
    pages = []
    while file.tell() < len(file.getvalue()):
        pages.append(OggPage(file))
    assert [page.sequence for page in pages] == list(range(len(pages)))
    assert len({page.serial for page in pages}) == 1
    assert [page.first for page in pages] == [True] + [False] * (len(pages) - 1)
    assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]
    assert len(decoded(file.getvalue())) == 3 * 48_000
    assert mutagen.File(BytesIO(file.getvalue())).tags.get("lyrics", [""]) == [lyrics]


def test_songs_have_serial_numbers_of_their_own(tmp_path: Path) -> None:
    serials = set()
    for seed in range(3):
        tags = SongTags(title=None, tags="pop", lyrics="la", seed=seed)
        serials.add(OggPage(BytesIO(written(tmp_path / "song", "ogg", 8000, [music(8000, 1)], tags))).serial)
    assert len(serials) == 3


def test_a_flac_file_is_the_finished_header_and_the_pieces(tmp_path: Path) -> None:
    """What a codec worker joins is what a gateway writes."""
    pcm = music(48_000)
    cuts = [0, 12 * BLOCK, 70 * BLOCK, len(pcm)]
    pieces = [encode_blocks(pcm[start:end], start // BLOCK, 48_000) for start, end in pairwise(cuts)]
    header = finished_header(stream_header(48_000, TAGS), len(pcm), hashlib.md5(pcm.tobytes()).digest())
    assert written(tmp_path / "song", "flac", 48_000, CUTS["odd"](pcm)) == header + b"".join(pieces)


def test_flac_that_begins_in_mid_song_has_the_frames_of_the_whole_song(tmp_path: Path) -> None:
    pcm, path = music(48_000), tmp_path / "song"
    with AudioWriter(path, plain("flac"), 48_000, TAGS, first_block=30) as writer:
        for piece in CUTS["odd"](pcm[30 * BLOCK :]):
            writer.write(piece)
    assert path.read_bytes() == stream_header(48_000, TAGS) + encode_blocks(pcm[30 * BLOCK :], 30, 48_000)
    assert encode_blocks(pcm, 0, 48_000).endswith(path.read_bytes()[writer.header_size :])
    assert np.array_equal(decoded(path.read_bytes()), pcm[30 * BLOCK :])


@needs_ffmpeg
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("audio_format", FORMATS)
def test_ffmpeg_hears_the_same_music_in_a_stream_as_in_the_file(
    tmp_path: Path, audio_format: AudioFormat, rate: int
) -> None:
    """Sample for sample, from the first one on: in MP3 the encoder's delay is left out of both."""
    path, pcm = tmp_path / "song", music(rate)
    with AudioWriter(path, plain(audio_format), rate, TAGS) as writer:
        begun = path.read_bytes()
        for piece in CUTS["odd"](pcm):
            writer.write(piece)
    finished = path.read_bytes()
    streamed = begun + finished[len(begun) :]  # as one received it who listened all the time
    command = ["ffmpeg", "-v", "quiet", "-i", "-", "-f", "s16le", "-"]
    stream, file = (
        np.frombuffer(subprocess.run(command, input=each, capture_output=True, check=True).stdout, np.int16)
        for each in (streamed, finished)
    )
    assert len(stream) >= 2 * len(pcm)
    assert np.array_equal(stream[: 2 * len(pcm)], file[: 2 * len(pcm)])
    assert np.abs(stream[: 2 * len(pcm)].reshape(-1, 2).astype(int) - pcm)[:-2000].max() < 2500
