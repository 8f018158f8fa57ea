"""A song's FLAC stream, window by window: wherever it is cut or put away, its pieces are those of a whole encode."""

import dataclasses
import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from services.codec_worker.engines.base import DecodeState
from services.codec_worker.song_file import SongFile
from services.codec_worker.song_stream import Piece, SavedDecode, SongStream
from shared.audio.files import AudioWriter
from shared.audio.flac import BLOCK, finished_header, stream_header
from shared.audio.forms import plain
from shared.audio.peaks import Peaks, peaks_of
from shared.audio.reading import read_audio
from shared.audio.tags import SongTags
from shared.errors import ObjectError, SongError
from shared.schema.job import AudioPart
from shared.schema.request import AudioFormat

RATE = 8000
TAGS = SongTags(title="A song", tags="piano", lyrics="la", seed=1)
HEADER = stream_header(RATE, TAGS)
SONG = np.random.default_rng(0).uniform(-1.1, 1.1, (6 * BLOCK + 123, 2)).astype(np.float32)
CUTS = [0, BLOCK - 1, BLOCK, 2 * BLOCK + 7, 2 * BLOCK + 9, 5 * BLOCK + 1000, len(SONG)]  # none where a block ends


def begun() -> SavedDecode:
    return SavedDecode(
        engine="e", state=DecodeState(seed=1), header=HEADER, rest=np.zeros((0, 2), np.int16), peaks=Peaks(RATE)
    )


def pieces(*, again_at_each_window: bool) -> tuple[list[Piece], bytes]:
    """The pieces of the song, and its peaks; each window in another process, or all in one."""
    stream, found = SongStream(begun(), RATE), []
    for index, (start, stop) in enumerate(pairwise(CUTS)):
        found.append(stream.add(SONG[start:stop], last=stop == len(SONG)))
        if again_at_each_window and stop < len(SONG):
            saved = stream.save(DecodeState(seed=1, window=index + 1, samples=stop))
            stream = SongStream(SavedDecode.unpack(saved), RATE)
    return found, stream.peaks()


def whole(folder: Path, audio_format: AudioFormat) -> Path:
    """The song, written at once."""
    with AudioWriter(folder / f"whole.{audio_format}", plain(audio_format), RATE, TAGS) as writer:
        writer.write(SONG)
    return folder / f"whole.{audio_format}"


@pytest.mark.parametrize("again", [False, True])
def test_the_pieces_are_the_frames_of_a_whole_encode_and_the_peaks_those_of_the_whole_song(
    tmp_path: Path, again: bool
) -> None:
    found, peaks = pieces(again_at_each_window=again)
    encoded = whole(tmp_path, "flac").read_bytes()
    assert b"".join(piece.frames for piece in found) == encoded[len(HEADER) :]
    pcm = np.concatenate([piece.pcm for piece in found])
    assert peaks == peaks_of([pcm], RATE)
    assert [len(piece.pcm) % BLOCK for piece in found] == [0] * 5 + [123]


def finished(folder: Path, audio_format: AudioFormat, stored: int) -> SongFile:
    """The finished files, of which the first pieces come from the store."""
    found, _ = pieces(again_at_each_window=True)
    with SongFile(folder, "song", audio_format, HEADER, RATE, TAGS) as file:
        for index, piece in enumerate(found):
            if index < stored:
                data = (HEADER if index == 0 else b"") + piece.frames
                file.add_part(AudioPart(key=f"a/{index}.part", size=len(data), samples=len(piece.pcm)), data)
            else:
                file.add(piece)
        file.finish()
    return file


@pytest.mark.parametrize("stored", [0, 3, 5])
@pytest.mark.parametrize("audio_format", ["flac", "wav", "mp3", "ogg"])
def test_the_finished_file_is_that_of_the_whole_song(tmp_path: Path, audio_format: AudioFormat, stored: int) -> None:
    file = finished(tmp_path, audio_format, stored)
    expected = whole(tmp_path, audio_format)
    assert file.samples == len(SONG)
    made, wanted = (np.concatenate(list(read_audio(path))) for path in (file.path, expected))
    assert np.array_equal(made, wanted)
    assert file.path.read_bytes() == expected.read_bytes(), "tags, lengths and the MD5 included"
    stream = HEADER + b"".join(piece.frames for piece in pieces(again_at_each_window=False)[0])
    flac = file.flac_path.read_bytes()
    assert flac[len(HEADER) :] == stream[len(HEADER) :]
    assert flac[: len(HEADER)] == finished_header(HEADER, len(SONG), flac[26:42]), "it differs in STREAMINFO alone"


def test_a_short_song_in_another_format_is_not_encoded_as_flac_too(tmp_path: Path) -> None:
    piece = SongStream(begun(), RATE).add(SONG[:5000], last=True, encode=False)
    with SongFile(tmp_path, "song", "wav", HEADER, RATE, TAGS) as file:
        file.add(piece)
        file.finish()
    assert not file.has_flac
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]
    assert soundfile.info(file.path).frames == 5000


def test_a_part_that_is_not_what_the_record_says_is_refused(tmp_path: Path) -> None:
    found, _ = pieces(again_at_each_window=False)
    data = HEADER + found[3].frames
    part = AudioPart(key="a", size=len(data), samples=len(found[3].pcm))
    broken = bytearray(data)
    broken[len(data) // 2] ^= 255
    other = AudioPart(key="a", size=len(data), samples=part.samples - BLOCK)
    for what, content in ((part, b""), (part, data[:-10]), (part, bytes(broken)), (other, data)):
        with SongFile(tmp_path, "song", "flac", HEADER, RATE, TAGS) as file, pytest.raises(ObjectError):
            file.add_part(what, content)


def test_a_window_too_short_for_a_block_is_kept_for_the_next(tmp_path: Path) -> None:
    stream = SongStream(begun(), RATE)
    first = stream.add(SONG[:100])
    assert (first.frames, len(first.pcm)) == (b"", 0)
    with SongFile(tmp_path, "song", "flac", HEADER, RATE, TAGS) as file:
        file.add_part(AudioPart(key="a", size=len(HEADER), samples=0), HEADER)
        file.add(stream.add(SONG[100:5000], last=True))
        file.finish()
    assert file.samples == soundfile.info(io.BytesIO(file.path.read_bytes())).frames == 5000


def test_what_is_saved_comes_back_to_the_last_bit_and_damage_is_noticed() -> None:
    stream = SongStream(begun(), RATE)
    stream.add(SONG[:5000])
    state = DecodeState(seed=1, window=1, samples=5000, taken=3, codes="c", overlap=np.ones((2, 9), np.float32))
    packed = stream.save(state)
    again = SavedDecode.unpack(packed)
    assert (again.engine, again.header, len(again.rest)) == ("e", HEADER, 5000 - BLOCK)
    for field in dataclasses.fields(state):
        assert np.array_equal(getattr(again.state, field.name), getattr(state, field.name))
    assert again.peaks.json() == stream.peaks()
    last = SONG[5000:9000]
    assert SongStream(again, RATE).add(last, last=True).frames == stream.add(last, last=True).frames
    for damaged in (packed[:-1], packed[:-1] + bytes([packed[-1] ^ 1]), packed.replace(b'"e"', b'"f"'), b"", b"[]" * 9):
        with pytest.raises(ObjectError, match="damaged"):
            SavedDecode.unpack(damaged)


def test_audio_that_is_not_finite_ends_the_song() -> None:
    with pytest.raises(SongError, match="not finite"):
        SongStream(begun(), RATE).add(np.full((100, 2), np.nan, np.float32))
