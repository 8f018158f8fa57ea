"""A song's FLAC is made piece by piece, in any process, and is that of a whole encode."""

import hashlib
import shutil
import subprocess
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import mutagen
import numpy as np
import pytest
import soundfile

from shared.audio.flac import BLOCK, decode_part, encode_blocks, finished_header, stream_header
from shared.audio.tags import SOFTWARE, SongTags
from shared.errors import ObjectError

TAGS = SongTags(title="Grüße 🎵", tags="pop,piano", lyrics="[Verse]\nHällo\nla la", seed=2**53 - 1)
RATE = 48_000
needs_flac = pytest.mark.skipif(shutil.which("flac") is None, reason="flac (Debian: flac) is missing")


def music(samples: int, seed: int = 0) -> np.ndarray:
    """Tones, noise, silence, and what is too loud, one after the other."""
    random = np.random.default_rng(seed)
    time = np.arange(samples)[:, None] / RATE
    loudness = np.abs(8 * np.sin(time)) ** 3
    wave: np.ndarray = loudness * (3000 * np.sin(2 * np.pi * time * [440, 554]) + random.normal(0, 200, (samples, 2)))
    wave[(time[:, 0] % 2) > 1.6] = 0
    return wave.clip(-32_768, 32_767).astype(np.int16)


def whole_file(pcm: np.ndarray, rate: int = RATE) -> bytes:
    file = BytesIO()
    soundfile.write(file, pcm, rate, "PCM_16", format="FLAC")
    return file.getvalue()


def frames_of(file: bytes) -> bytes:
    """What comes after the metadata blocks."""
    at, last = 4, False
    while not last:
        last = file[at] >= 0x80
        at += 4 + int.from_bytes(file[at + 1 : at + 4])
    return file[at:]


@pytest.mark.parametrize("rate", [48_000, 44_100, 16_000, 8000, 12_345, 11_000])
@pytest.mark.parametrize("samples", [1, 100, BLOCK, 5 * BLOCK, 200 * BLOCK + 1, 200 * BLOCK + 3000])
def test_frames_made_apart_are_those_of_a_whole_encode(rate: int, samples: int) -> None:
    pcm = music(samples)
    cuts = sorted({0, *np.random.default_rng(samples).integers(0, 1 + samples // BLOCK, 5), -(-samples // BLOCK)})
    pieces = [encode_blocks(pcm[first * BLOCK : end * BLOCK], first, rate) for first, end in pairwise(cuts)]
    assert b"".join(pieces) == frames_of(whole_file(pcm, rate))


def test_the_frames_of_a_long_song_are_those_of_a_whole_encode() -> None:
    """Numbers from 128 and from 2,048 on are coded with one byte more."""
    pcm = np.tile(music(10 * BLOCK), (206, 1))
    pieces = [encode_blocks(pcm[at * BLOCK : (at + 412) * BLOCK], at, RATE) for at in range(0, 2060, 412)]
    assert b"".join(pieces) == frames_of(whole_file(pcm))


@pytest.mark.parametrize("first", [0, 127, 2047, 0xD7FF, 0xDFFF, 0xFFFF, 0x10FFF0])
def test_a_stream_that_begins_in_mid_song_is_decoded(first: int) -> None:
    pcm = music(7 * BLOCK + 500)
    header, frames = stream_header(RATE, TAGS), encode_blocks(pcm, first, RATE)
    assert np.array_equal(decode_part(header, frames), pcm)


def test_no_samples_make_no_frames() -> None:
    assert encode_blocks(music(0), 7, RATE) == b""


@pytest.mark.parametrize("rate", [48_000, 8000])
def test_stream_and_file_differ_in_streaminfo_alone(tmp_path: Path, rate: int) -> None:
    pcm = music(33 * BLOCK + 77)
    header, frames = stream_header(rate, TAGS), encode_blocks(pcm, 0, rate)
    assert header == stream_header(rate, TAGS)
    finished = finished_header(header, len(pcm), hashlib.md5(pcm.tobytes()).digest())
    assert len(finished) == len(header)
    assert {at for at in range(len(header)) if header[at] != finished[at]} <= set(range(8, 42))
    path = tmp_path / "song.flac"
    path.write_bytes(finished + frames)
    assert np.array_equal(soundfile.read(path, dtype="int16")[0], pcm)
    file = mutagen.File(path)
    assert (file.info.sample_rate, file.info.channels, file.info.bits_per_sample) == (rate, 2, 16)
    assert file.info.total_samples == len(pcm)
    assert file.info.md5_signature == int.from_bytes(hashlib.md5(pcm.tobytes()).digest())
    assert {name: file.tags[name] for name in ("title", "genre", "lyrics", "seed", "encoder")} == {
        "title": [TAGS.title],
        "genre": [TAGS.tags],
        "lyrics": [TAGS.lyrics],
        "seed": [str(TAGS.seed)],
        "encoder": [SOFTWARE],
    }


def test_a_song_without_title_and_seed_has_none(tmp_path: Path) -> None:
    header = stream_header(RATE, SongTags(title=None, tags="", lyrics="", seed=None))
    path = tmp_path / "song.flac"
    path.write_bytes(header + encode_blocks(music(BLOCK), 0, RATE))
    assert set(mutagen.File(path).tags.keys()) == {"encoder"}


@needs_flac
@pytest.mark.parametrize(("first", "finished"), [(0, True), (0, False), (300, False)])
def test_the_official_decoder_finds_no_fault(tmp_path: Path, first: int, finished: bool) -> None:
    pcm = music(60 * BLOCK + 9)
    header = stream_header(RATE, TAGS)
    if finished:
        header = finished_header(header, len(pcm), hashlib.md5(pcm.tobytes()).digest())
    path = tmp_path / "song.flac"
    path.write_bytes(header + encode_blocks(pcm, first, RATE))
    run = subprocess.run(["flac", "--test", "--silent", path], capture_output=True, text=True, check=True)
    assert run.stderr == "" or (not finished and "cannot check MD5" in run.stderr)


def damaged(frames: bytes) -> dict[str, bytes]:
    """A piece with each kind of damage: a bit anywhere, an end that is missing, no FLAC at all."""
    size = len(frames)
    flipped = {
        f"bit in byte {at}": frames[:at] + bytes([frames[at] ^ 4]) + frames[at + 1 :]
        for at in [*range(20), *range(20, size, size // 40), size - 1]
    }
    cut = {f"cut at {end}": frames[:end] for end in (1, 10, size // 2, size - 1)}
    return flipped | cut | {"empty": b"", "text": b"no audio" * 1000}


@pytest.mark.parametrize("kind", damaged(bytes(4000)))
def test_a_damaged_piece_is_an_error(kind: str) -> None:
    pcm = music(9 * BLOCK)
    frames = encode_blocks(pcm, 300, RATE)
    position = list(damaged(bytes(4000))).index(kind)
    with pytest.raises(ObjectError, match="cannot be read"):
        decode_part(stream_header(RATE, TAGS), list(damaged(frames).values())[position])


def test_a_damaged_header_is_an_error() -> None:
    frames = encode_blocks(music(BLOCK), 0, RATE)
    with pytest.raises(ObjectError, match="cannot be read"):
        decode_part(b"no header" + stream_header(RATE, TAGS), frames)
