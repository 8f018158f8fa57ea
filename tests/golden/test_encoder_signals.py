"""What the encoder hears: resampling, mel spectra and the cutting into chunks, against the golden vectors."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.codec_worker.encoder.chunks import RATE, frame_count
from services.codec_worker.encoder.mel import htk_filters, mu_decibels, slaney_filters
from services.codec_worker.encoder.recording import Recording, signals
from services.codec_worker.encoder.resampling import Resampler
from shared.model.encoder_config import CHUNK
from tests.golden.encoder_set import EncoderSet, encoder_folder
from tests.unit.peak import PeakBytes


@pytest.fixture(scope="module")
def golden_set() -> EncoderSet:
    return EncoderSet.open()


def near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)


def test_recorded_rates_are_resampled_as_the_reference_does(golden_set: EncoderSet) -> None:
    rates = [int(name) for name in golden_set.facts["resample"] if name.isdigit()]
    assert rates
    for rate in rates:
        audio, wanted = (golden_set.vectors[f"resample.{rate}.{name}"] for name in ("in", "out"))
        got = Resampler(rate, RATE)(audio.numpy().astype(np.float32) / 32768)
        assert got.shape == wanted.shape, rate
        near(got, wanted, golden_set.tolerance("resample"))


def test_the_taps_are_the_references(golden_set: EncoderSet) -> None:
    facts = golden_set.facts["resample"]
    for name, resampler in (
        ("24k_16k", Resampler(24_000, 16_000, torch.float64)),
        ("44100_24k", Resampler(44_100, 24_000)),
    ):
        wanted = golden_set.vectors[f"resample.kernel_{name}"][:, 0]
        assert resampler.width == facts[f"width_{name}"]
        start, taps = resampler.taps(0, len(wanted))
        start += resampler.width
        near(taps, wanted[:, start : start + taps.shape[1]], 1e-7)
        wanted[:, start : start + taps.shape[1]] = 0
        assert float(wanted.abs().max()) < 1e-7, "taps that are left out have no weight"


@pytest.mark.parametrize("rate", [48_000, 44_100, 44_056, 47_999, 8_000, 24_000])
def test_a_part_of_a_recording_is_resampled_as_in_the_whole(rate: int) -> None:
    audio = np.random.default_rng(0).standard_normal((2, 2 * rate + 77), np.float32)
    resampler = Resampler(rate, RATE)
    whole = resampler(audio)
    assert whole.shape == (2, math.ceil(RATE * audio.shape[1] / rate))
    for start, stop in ((0, 1), (0, 700), (1234, 20_000), (40_000, whole.shape[1])):
        near(resampler(audio, start, stop), whole[:, start:stop], 1e-6)


def test_a_tone_keeps_its_pitch_and_loudness_at_a_rate_without_a_common_divisor() -> None:
    """All taps of such a rate would take 4.6 GB."""
    rate, seconds = 47_999, 1
    tone = np.sin(2 * np.pi * 440 * np.arange(rate * seconds) / rate).astype(np.float32)[None]
    with PeakBytes("cpu", beside=torch.empty(1)) as peak:
        got = Resampler(rate, RATE)(tone)
    assert peak.bytes < 20e6
    wanted = torch.sin(2 * math.pi * 440 * torch.arange(RATE * seconds, dtype=torch.float64) / RATE).float()
    near(got[0, 100:-100], wanted[100:-100], 1e-3)


def test_the_mel_filters_are_the_references(golden_set: EncoderSet) -> None:
    wanted = golden_set.vectors["whisper.mel_filters"]
    near(slaney_filters(wanted.shape[1]), wanted, 1e-8)
    stored = load_file(encoder_folder() / "ckpt/HeartCodec-oss-encoder/encoder.safetensors")
    (filters,) = (tensor for name, tensor in stored.items() if name.endswith("mel_scale.fb"))
    near(htk_filters(filters.shape[1]), filters, 1e-6)


def test_chunks_and_mels_are_the_references(golden_set: EncoderSet) -> None:
    config = golden_set.checkpoint.encoder
    assert config is not None
    for name, case in golden_set.facts["cases"].items():
        recording = Recording(golden_set.audio(name), case["sample_rate"])
        assert (recording.samples, recording.chunks, recording.frames) == (
            case["samples_24k"],
            case["chunks"],
            case["frames"],
        )
        chunks = [recording.chunk(index) for index in range(recording.chunks)]
        whole = torch.cat([chunk[:, :CHUNK].expand(2, -1) for chunk in chunks], dim=1)
        at = golden_set.vectors[f"{name}.audio24_idx"].long()
        near(whole[:, at], golden_set.vectors[f"{name}.audio24_at_idx"], golden_set.tolerance("audio24"))
        for index, chunk in enumerate(chunks):
            stem, rows = f"{name}.c{index}", case[f"c{index}"]
            heard = signals(chunk, config)
            at = golden_set.vectors[f"{stem}.audio16_idx"].long()
            wanted = golden_set.vectors[f"{stem}.audio16_at_idx"]
            near(heard.audio[:, at].expand(2, -1), wanted, golden_set.tolerance("audio16"))
            decibels = mu_decibels(chunk, config.mu.n_mels)[:, rows["frames_100hz"]].transpose(1, 2)
            near(decibels.expand(2, -1, -1), golden_set.vectors[f"{stem}.mel_db"], golden_set.tolerance("mel_db"))
            near(heard.mel * config.mu.std + config.mu.mean, mu_decibels(chunk, config.mu.n_mels), 1e-4)
            mel = heard.whisper_mel[:, rows["whisper_frames"]].transpose(1, 2)
            wanted = golden_set.vectors[f"{stem}.whisper_mel"]
            near(mel.expand(2, -1, -1), wanted, golden_set.tolerance("whisper_mel"))


def test_frames_are_counted_as_the_reference_does(golden_set: EncoderSet) -> None:
    counted = golden_set.facts["frame_count"]
    assert counted["columns"] == ["samples_24k", "chunks", "frames"]
    for samples, chunks, frames in counted["rows"]:
        recording = Recording(np.broadcast_to(np.zeros(1, np.float32), (1, samples)), RATE)
        assert (recording.samples, recording.chunks) == (samples, chunks)
        assert recording.frames == frame_count(samples) == frames
        assert sum(recording.frames_of(chunk) for chunk in range(chunks)) == frames
        assert recording.whole_frames in (frames, frames - 1)


@pytest.mark.parametrize(
    ("audio", "rate"),
    [
        (np.zeros((3, 100), np.float32), RATE),
        (np.zeros((1, 0), np.float32), RATE),
        (np.zeros(100, np.float32), RATE),
        (np.zeros((1, 100), np.int16), RATE),
        (np.zeros((1, 100), np.float32), 0),
    ],
)
def test_what_is_no_recording_is_refused(audio: np.ndarray, rate: int) -> None:
    with pytest.raises(ValueError, match=r"expected float32|cannot be resampled"):
        Recording(audio, rate)
