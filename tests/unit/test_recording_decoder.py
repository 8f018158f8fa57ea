"""An upload becomes FLAC: the same samples, rate, channels and loudness, as far as the file goes."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from shared.audio.decoding.messages import DecodingLimits
from shared.audio.files import AudioWriter
from shared.audio.forms import plain
from shared.schema.request import AudioFormat
from tests.unit.recordings import FORMATS, RATE, TAGS, decoded, file_of, id3, music, refused

FULL_SCALE = 1 << 23  # of what `decoded` returns


@pytest.mark.parametrize("audio_format", FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (48_000, 1)])
async def test_every_format_keeps_its_rate_channels_and_samples(
    tmp_path: Path, audio_format: AudioFormat, rate: int, channels: int
) -> None:
    data = file_of(audio_format, music(2.3, rate, channels), rate)
    found, audio = await decoded(tmp_path, data)
    (tmp_path / "whole").write_bytes(data)
    expected, _ = soundfile.read(tmp_path / "whole", always_2d=True)
    assert (found.audio_format, found.sample_rate, found.channels, found.bits) == (audio_format, rate, channels, 16)
    assert found.seconds == pytest.approx(2.3, abs=0.05)
    assert audio.shape == expected.shape
    assert np.abs(audio / FULL_SCALE - expected).max() <= 0.51 / 2**15


@pytest.mark.parametrize("rate", [8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000])
async def test_mp3_of_every_rate_is_known_by_its_frames(tmp_path: Path, rate: int) -> None:
    found, audio = await decoded(tmp_path, file_of("mp3", music(1, rate), rate))
    assert (found.audio_format, found.sample_rate) == ("mp3", rate)
    assert len(audio) == pytest.approx(rate, abs=2000)


async def test_opus_in_ogg_is_taken(tmp_path: Path) -> None:
    found, _ = await decoded(tmp_path, file_of("ogg", music(1, 48_000), 48_000, "OPUS"))
    assert (found.audio_format, found.sample_rate) == ("ogg", 48_000)


@pytest.mark.parametrize(
    ("audio_format", "subtype", "bits"),
    [
        ("flac", "PCM_S8", 16),
        ("flac", "PCM_16", 16),
        ("flac", "PCM_24", 24),
        ("wav", "PCM_U8", 16),
        ("wav", "PCM_16", 16),
        ("wav", "PCM_24", 24),
        ("wav", "PCM_32", 24),
        ("wav", "ULAW", 16),
        ("wavex", "PCM_24", 24),
        ("wav", "FLOAT", 24),
        ("wav", "DOUBLE", 24),
    ],
)
async def test_no_bit_is_lost_up_to_24(tmp_path: Path, audio_format: str, subtype: str, bits: int) -> None:
    whole = np.random.default_rng(1).integers(-FULL_SCALE, FULL_SCALE, (5000, 2), np.int32)
    whole[:2] = [[FULL_SCALE - 1, -FULL_SCALE], [0, 1]]
    source = whole / FULL_SCALE if subtype in ("FLOAT", "DOUBLE") else whole << 8
    data = file_of(audio_format, source, RATE, subtype)
    found, audio = await decoded(tmp_path, data)
    (tmp_path / "whole").write_bytes(data)
    expected = soundfile.read(tmp_path / "whole", dtype="float64")[0] * FULL_SCALE
    assert found.bits == bits
    assert np.array_equal(audio, expected.astype(np.int32))


@pytest.mark.parametrize("audio_format", FORMATS)
async def test_quiet_music_stays_quiet(tmp_path: Path, audio_format: str) -> None:
    audio = 0.01 * music(1, channels=1)
    _, read = await decoded(tmp_path, file_of(audio_format, audio))
    assert (read / FULL_SCALE).std() == pytest.approx(audio.std(), rel=0.03)


async def test_floats_above_full_scale_are_clipped(tmp_path: Path) -> None:
    audio = 4 * music(0.5)
    found, read = await decoded(tmp_path, file_of("wav", audio, subtype="FLOAT"))
    clipped = np.clip(np.round(audio.astype(float) * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1)
    assert found.bits == 24
    assert np.array_equal(read, clipped)


async def test_floats_on_another_scale_are_refused(tmp_path: Path) -> None:
    error = await refused(tmp_path, file_of("wav", 32768 * music(0.5), subtype="FLOAT"))
    assert error.reason == "unsupported"
    assert "times full scale" in str(error)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
async def test_samples_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    audio = music(2)
    audio[-5, 1] = bad
    error = await refused(tmp_path, file_of("wav", audio, subtype="FLOAT"))
    assert error.reason == "damaged"
    assert "not finite" in str(error)


@pytest.mark.parametrize("audio_format", FORMATS)
@pytest.mark.parametrize("finished", [True, False])
async def test_a_stream_that_somebody_kept_is_decoded_to_its_end(
    tmp_path: Path, audio_format: AudioFormat, finished: bool
) -> None:
    """Unfinished FLAC is 2^63 - 1 samples long to libsndfile, WAV 2^32 - 1 bytes; MP3's length it would guess."""
    loud_then_quiet = np.concatenate([np.random.default_rng(1).normal(0, 0.3, (2 * RATE, 2)), 0.1 * music(6)])
    song = loud_then_quiet.clip(-1, 0.999).astype(np.float32)
    path = tmp_path / "song"
    writer = AudioWriter(path, plain(audio_format), RATE, TAGS)
    with writer:
        writer.write(song)
        growing = path.read_bytes()
    data = path.read_bytes() if finished else growing
    path.unlink()
    found, audio = await decoded(tmp_path, data)
    assert 8 - (0.1 if finished else 1) <= found.seconds <= 8.1  # encoders hold up to a second back
    if audio_format in ("flac", "wav"):
        expected = np.round(song * np.float32(2**15)).astype(int) << 8
        assert np.array_equal(audio, expected[: len(audio)])
    ends = np.abs(audio[:RATE]).mean(), np.abs(audio[-RATE:]).mean()
    assert ends == pytest.approx((0.24 * FULL_SCALE, 0.026 * FULL_SCALE), rel=0.1)


@pytest.mark.parametrize("audio_format", FORMATS)
async def test_tags_and_pictures_before_and_behind_the_music_are_passed_over(tmp_path: Path, audio_format: str) -> None:
    data = file_of(audio_format, music(1))
    whole, audio = await decoded(tmp_path, data)
    size = 3_000_000
    front = id3(size) + b"\xff\xfb\x90\x64" * (size // 4) if audio_format in ("flac", "mp3") else b""
    found, same = await decoded(tmp_path, front + data + b"TAG" + bytes(125))
    assert found == whole
    assert np.array_equal(same, audio)


async def test_a_recording_has_no_more_seconds_than_allowed(tmp_path: Path) -> None:
    data, limits = file_of("flac", music(3)), DecodingLimits(seconds=3)
    assert (await decoded(tmp_path, data, limits))[0].seconds == 3
    (tmp_path / "audio.flac").unlink()
    error = await refused(tmp_path, file_of("flac", music(3.01)), limits)
    assert error.reason == "too-long"
    assert "3 seconds" in str(error)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (file_of("wav", music(0.2, channels=6)), "6 channels"),
        (file_of("wav", music(0.2, 4000), 4000), "4000 Hz"),
        (file_of("wav", music(0.2, 384_000), 384_000), "384000 Hz"),
        (file_of("wav", music(0.2, 96_001), 96_001), "96001 Hz"),
        (file_of("wav", music(0.2), subtype="MS_ADPCM"), "MS_ADPCM"),
        (file_of("wav", music(0.2, channels=1), subtype="GSM610"), "GSM610"),
    ],
)
async def test_what_is_not_taken_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    error = await refused(tmp_path, data)
    assert error.reason == "unsupported"
    assert words in str(error)
