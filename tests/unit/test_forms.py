"""Forms that other services' APIs name: what is possible, and what a song sounds like in each of them."""

import subprocess
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import mutagen
import numpy as np
import pytest
import soundfile
from mutagen.mp3 import BitrateMode
from mutagen.ogg import OggPage

from shared.audio.files import AudioWriter
from shared.audio.forms import Codec, Form, plain
from shared.audio.g711 import alaw, ulaw
from shared.audio.tags import SongTags
from tests.unit.test_audio_growing import CUTS, music, needs_ffmpeg

TAGS = SongTags(title="Ein Lied", tags="pop", lyrics="la la", seed=7)
RATE = 48_000  # of the song
HZ = 437  # of a tone
HEADERLESS = {"pcm": "PCM_16", "ulaw": "ULAW", "alaw": "ALAW"}
FORMS = {
    str(form): form
    for form in (
        Form("mp3", 44_100, 128),
        Form("mp3", 22_050, 64),
        Form("mp3", 24_000, channels=1),
        Form("opus", 48_000, 96),
        Form("opus", 16_000, 24, channels=1),
        Form("opus", 24_000),
        Form("pcm", 44_100),
        Form("pcm", 48_000, channels=1),
        Form("pcm", 24_000, channels=1),
        Form("ulaw", 8000, channels=1),
        Form("alaw", 8000, channels=1),
    )
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def written(path: Path, form: Form, pieces: list[np.ndarray], rate: int = RATE) -> bytes:
    with AudioWriter(path, form, rate, TAGS) as writer:
        for piece in pieces:
            writer.write(piece)
    return path.read_bytes()


def decoded(file: bytes, form: Form) -> tuple[np.ndarray, int]:
    """Float ``[samples, channels]`` and the sample rate, as libsndfile reads them."""
    raw = {}
    if form.codec in HEADERLESS:
        raw = {
            "format": "RAW",
            "subtype": HEADERLESS[form.codec],
            "samplerate": form.sample_rate,
            "channels": form.channels,
        }
    audio, rate = soundfile.read(BytesIO(file), always_2d=True, **raw)
    return audio, rate


def tone(samples: int, rate: int) -> np.ndarray:
    """Another level in each channel, float32 ``[samples, 2]``."""
    wave = np.sin(2 * np.pi * HZ * np.arange(samples) / rate)
    return np.stack([0.6 * wave, 0.2 * wave], axis=1).astype(np.float32)


# --- which there are


@pytest.mark.parametrize(
    ("form", "name", "content_type", "suffix"),
    [
        (plain("flac"), "flac", "audio/flac", "flac"),
        (plain("mp3"), "mp3", "audio/mpeg", "mp3"),
        (Form("mp3", 44_100, 128), "mp3_44100_128", "audio/mpeg", "mp3"),
        (Form("opus", 48_000, 96), "opus_48000_96", "audio/ogg; codecs=opus", "opus"),
        (Form("pcm", 24_000, channels=1), "pcm_24000_mono", "audio/pcm; rate=24000; channels=1", "pcm"),
        (Form("pcm", 16_000), "pcm_16000", "audio/pcm; rate=16000; channels=2", "pcm"),
        (Form("ulaw", 8000, channels=1), "ulaw_8000_mono", "audio/PCMU", "ulaw"),
        (Form("alaw", 8000, channels=1), "alaw_8000_mono", "audio/PCMA", "alaw"),
    ],
)
def test_a_form_says_what_it_is(form: Form, name: str, content_type: str, suffix: str) -> None:
    assert (str(form), form.content_type, form.suffix) == (name, content_type, suffix)
    assert form.audio_format == (name if name in ("flac", "mp3") else None)


@pytest.mark.parametrize(
    ("codec", "sample_rate", "bit_rate", "channels", "words"),
    [
        ("aac", 44_100, None, 2, "no codec aac; take one of flac, wav"),
        ("flac", 44_100, None, 2, "flac has the song's sample rate"),
        ("wav", None, None, 1, "wav has the song's sample rate, two channels"),
        ("ogg", None, 128, 2, "ogg has .* no bit rate"),
        ("mp3", None, 128, 2, "needs a sample rate"),
        ("mp3", 96_000, None, 2, "no sample rate of 96000 Hz; take one of 8000, 11025"),
        ("mp3", 44_100, 33, 2, "32, 40, .* or 320 kbit/s"),
        ("mp3", 22_050, 192, 2, "mp3 at 22050 Hz has a bit rate of 8, .* or 160 kbit/s"),
        ("opus", 44_100, 96, 2, "8000, 12000, 16000, 24000 or 48000 Hz"),
        ("opus", None, None, 2, "opus needs a sample rate"),
        ("opus", 48_000, 513, 2, "12 to 512 kbit/s"),
        ("opus", 48_000, 5, 1, "6 to 256 kbit/s"),
        ("pcm", None, None, 2, "pcm needs a sample rate"),
        ("pcm", 96_000, None, 2, "8000 to 48000 Hz"),
        ("pcm", 48_000, 768, 2, "no bit rate"),
        ("pcm", 48_000, None, 6, "1 or 2 channels"),
        ("ulaw", 8000, None, 2, "one channel"),
        ("alaw", 16_000, None, 1, "8000 Hz"),
    ],
)
def test_what_a_codec_cannot_do_is_refused_in_words(
    codec: Codec, sample_rate: int | None, bit_rate: int | None, channels: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Form(codec, sample_rate, bit_rate, channels)  # type: ignore[arg-type]  # any number of channels


# --- what they sound like


@every_form
def test_a_song_is_as_long_and_sounds_at_the_same_time_and_pitch(tmp_path: Path, form: Form) -> None:
    assert form.sample_rate is not None
    samples = 3 * RATE + 77
    heard, rate = decoded(written(tmp_path / "song", form, CUTS["odd"](tone(samples, RATE))), form)
    count = int(samples * form.sample_rate / RATE + 0.5)
    expected = tone(count, form.sample_rate)
    if form.channels == 1:
        expected = expected.mean(axis=1, keepdims=True)
    assert rate == form.sample_rate
    assert heard.shape == (count, form.channels)
    inner = slice(2000, count - 3000)  # encoders begin and end as they like
    assert np.abs(heard[inner] - expected[inner]).max() < (0.06 if form.codec in ("mp3", "opus") else 0.013)
    spectrum = np.abs(np.fft.rfft(heard[inner, 0] * np.hanning(len(heard[inner]))))
    assert np.argmax(spectrum) * rate / len(heard[inner]) == pytest.approx(HZ, abs=0.5)


@pytest.mark.parametrize("rate", [8000, 24_000, 44_100, 48_000])
def test_samples_keep_their_places_at_every_rate(tmp_path: Path, rate: int) -> None:
    samples = 2 * rate + 3
    form = Form("pcm", 16_000)
    heard, _ = decoded(written(tmp_path / "song", form, [tone(samples, rate)], rate), form)
    assert len(heard) == int(samples * 16_000 / rate + 0.5)
    inner = slice(200, len(heard) - 200)
    assert np.abs(heard - tone(len(heard), 16_000))[inner].max() < 0.001


def test_what_a_rate_has_no_room_for_is_left_out(tmp_path: Path) -> None:
    """And not heard as another tone."""
    wave = 0.8 * np.sin(2 * np.pi * 5000 * np.arange(RATE) / RATE)
    form = Form("pcm", 8000)
    heard, _ = decoded(written(tmp_path / "song", form, [np.stack([wave, wave], axis=1).astype(np.float32)]), form)
    assert np.abs(heard[100:-100]).max() < 0.001


def test_what_becomes_louder_than_full_scale_is_clipped(tmp_path: Path) -> None:
    square = np.where(np.arange(RATE) // 60 % 2, 32_767, -32_768).astype(np.int16)
    form = Form("pcm", 16_000)
    heard, _ = decoded(written(tmp_path / "song", form, [np.stack([square, square], axis=1)]), form)
    halves = heard[100:15_900, 0].reshape(-1, 20)[:, 3:17]  # of waves, without the steps between them
    assert np.array_equal(np.sign(halves), np.resize([[1], [-1]], (len(halves), 1)).repeat(14, axis=1))
    assert np.abs(heard).max() > 0.999


# --- while a song grows


@every_form
def test_every_cut_makes_the_same_bytes(tmp_path: Path, form: Form) -> None:
    pcm = music(RATE, 2)
    files = {name: written(tmp_path / name, form, cut(pcm)) for name, cut in CUTS.items()}
    assert {name for name, file in files.items() if file != files["whole"]} == set()


@every_form
def test_bytes_once_written_stay(tmp_path: Path, form: Form) -> None:
    path, states = tmp_path / "song", []
    with AudioWriter(path, form, RATE, TAGS) as writer:
        for piece in np.array_split(music(RATE, 4), 8):
            writer.write(piece)
            states.append(path.read_bytes())
    whole, header = path.read_bytes(), writer.header_size
    for state in states:
        assert state[header:] == whole[header : len(state)]
    assert len(states[5]) > len(whole) / 4, "nothing comes before the end"


@needs_ffmpeg
@pytest.mark.parametrize("name", ["mp3_44100_128", "mp3_24000_mono", "opus_48000_96"])
def test_ffmpeg_hears_the_same_music_in_a_stream_as_in_the_file(tmp_path: Path, name: str) -> None:
    path, pcm, form = tmp_path / "song", music(RATE, 3), FORMS[name]
    with AudioWriter(path, form, RATE, TAGS) as writer:
        begun = path.read_bytes()
        writer.write(pcm)
    finished = path.read_bytes()
    command = ["ffmpeg", "-v", "quiet", "-i", "-", "-f", "s16le", "-"]
    stream, file = (
        subprocess.run(command, input=each, capture_output=True, check=True).stdout
        for each in (begun + finished[len(begun) :], finished)
    )
    expected = round(len(pcm) * (form.sample_rate or 0) / RATE) * form.channels * 2  # bytes
    assert len(stream) >= expected
    assert stream[:expected] == file[:expected]


# --- bit rates


@pytest.mark.parametrize(("rate", "bit_rate"), [(44_100, 32), (44_100, 192), (22_050, 32), (24_000, 48), (48_000, 320)])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_has_the_constant_bit_rate_that_was_named(tmp_path: Path, rate: int, bit_rate: int, channels: int) -> None:
    file = written(tmp_path / "song", Form("mp3", rate, bit_rate, channels), [music(RATE, 4)])  # type: ignore[arg-type]
    info = mutagen.File(BytesIO(file)).info
    assert (info.sample_rate, info.channels) == (rate, channels)
    assert info.bitrate == pytest.approx(bit_rate * 1000, rel=0.01)
    assert info.bitrate_mode in (BitrateMode.CBR, BitrateMode.UNKNOWN)  # unknown where no info frame says it
    assert len(file) * 8 / 4000 == pytest.approx(bit_rate, rel=0.05)


@pytest.mark.parametrize("bit_rate", [32, 64, 96, 128, 192])
def test_opus_comes_near_its_bit_rate(tmp_path: Path, bit_rate: int) -> None:
    file = written(tmp_path / "song", Form("opus", 48_000, bit_rate), [music(RATE, 4)])
    assert bit_rate < len(file) * 8 / 4000 < bit_rate + 5


# --- Opus


@pytest.mark.parametrize("lyrics", ["", "la la\n" * 20_000])
def test_opus_carries_the_song_in_pages_without_a_gap(tmp_path: Path, lyrics: str) -> None:
    tags = SongTags(title="Ein Lied", tags="pop", lyrics=lyrics, seed=7)
    with AudioWriter(tmp_path / "song", Form("opus", 48_000), RATE, tags) as writer:
        writer.write(music(RATE, 3))
    file = BytesIO((tmp_path / "song").read_bytes())
    pages = []
    while file.tell() < len(file.getvalue()):
        pages.append(OggPage(file))
    assert [page.sequence for page in pages] == list(range(len(pages)))
    assert len({page.serial for page in pages}) == 1
    assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]
    found = mutagen.File(BytesIO(file.getvalue()))
    assert found.info.length == pytest.approx(3, abs=0.01)
    assert (found.tags["title"], found.tags.get("lyrics", [""])) == (["Ein Lied"], [lyrics])


# --- G.711

SAMPLES = np.arange(-32_768, 32_768).astype(np.int16)


def ulaw_value(code: int) -> int:
    """The sample that a byte of the µ-law stands for: ITU-T G.711, table 2, in 16 bits."""
    code = ~code & 0xFF
    magnitude = ((2 * (code & 0xF) + 33) << (code >> 4 & 7)) - 33
    return 4 * (-magnitude if code & 0x80 else magnitude)


def alaw_value(code: int) -> int:
    """The sample that a byte of the A-law stands for: ITU-T G.711, table 1, in 16 bits."""
    code ^= 0x55
    exponent, mantissa = code >> 4 & 7, code & 0xF
    magnitude = 2 * mantissa + 1 if exponent == 0 else (2 * mantissa + 33) << exponent - 1
    return 8 * (magnitude if code & 0x80 else -magnitude)


@pytest.mark.parametrize(("code", "value", "loudest"), [(ulaw, ulaw_value, 32_635), (alaw, alaw_value, 32_767)])
def test_a_byte_of_g711_stands_for_the_samples_around_its_value(
    code: Callable[[np.ndarray], np.ndarray], value: Callable[[int], int], loudest: int
) -> None:
    """And the last one of the µ-law for those that are louder."""
    coded = code(SAMPLES)
    for byte in range(256):
        samples = SAMPLES[coded == byte].astype(int)
        assert np.all(np.diff(samples) == 1), "they follow each other"
        heard = samples[np.abs(samples) <= loudest]
        assert abs(heard.mean() - value(byte)) <= 2


@pytest.mark.parametrize(("value", "subtype"), [(ulaw_value, "ULAW"), (alaw_value, "ALAW")])
def test_libsndfile_reads_a_byte_of_g711_as_the_same_value(value: Callable[[int], int], subtype: str) -> None:
    read, _ = soundfile.read(
        BytesIO(bytes(range(256))), samplerate=8000, channels=1, format="RAW", subtype=subtype, dtype="int16"
    )
    assert read.tolist() == [value(byte) for byte in range(256)]
