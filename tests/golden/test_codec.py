"""HeartCodec against the golden vectors: every stage, then whole songs, at two window lengths."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.codec_worker.model import EulerSolver, HeartCodec, Schedule, Splicer, WindowPlan, load_weights
from services.codec_worker.model.estimator import time_features
from shared.frames import frames_nearest
from shared.model.checkpoint import Checkpoint

Vectors = dict[str, Tensor]


@pytest.fixture(scope="module")
def vectors(golden: Path) -> Vectors:
    return load_file(golden / "codec.safetensors")


@pytest.fixture(scope="module")
def cases(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / "codec.json").read_text())
    return found


@pytest.fixture(scope="module")
def codec(golden_checkpoint: Checkpoint) -> Iterator[HeartCodec]:
    model = HeartCodec(golden_checkpoint.codec, torch.float32)
    load_weights(model, golden_checkpoint.codec_path)
    with torch.inference_mode():
        yield model.requires_grad_(False)


def plan_of(codec: HeartCodec, case: dict[str, Any]) -> WindowPlan:
    return WindowPlan(case["L"], codec.config.sample_rate, frames_nearest(case["duration"]))


def conditioning(codec: HeartCodec, vectors: Vectors, plan: WindowPlan, window: int) -> Tensor:
    codes = vectors["codes"][:, : plan.frames].numpy().astype(np.int16)
    mu: Tensor = codec.quantizer(torch.from_numpy(plan.cut(codes, window)).long())
    return mu


def reference_noise(plan: WindowPlan, seed: int, channels: int) -> list[Tensor]:
    """Noise in the order of the reference's draws: one unused at the start, another before every later window."""
    torch.manual_seed(seed)
    latents = 2 * plan.window
    torch.randn(1, latents, channels)
    noise = []
    for window in range(plan.count):
        if window:
            torch.randn(1, latents - plan.context, channels)
        noise.append(torch.randn(1, latents, channels)[0])
    return noise


def solve(
    codec: HeartCodec,
    vectors: Vectors,
    cases: dict[str, Any],
    plan: WindowPlan,
    noise: list[Tensor],
    guidance: float | None = None,
) -> list[Tensor]:
    """Latents of every window, with the steps and, unless another is given, the guidance that the set was made with."""
    recorded, latents = cases["one"], []
    schedule = Schedule(codec.estimator, recorded["num_steps"])
    guidance = recorded["guidance_scale"] if guidance is None else guidance
    context = torch.zeros(0, codec.config.out_channels)
    for window in range(plan.count):
        mu = conditioning(codec, vectors, plan, window)
        solver = EulerSolver(codec.estimator, schedule, mu, noise[window], context, guidance)
        while not solver.finished:
            solver.step()
        latents.append(solver.latents)
        context = solver.latents[-plan.context :]
    return latents


def waveform(codec: HeartCodec, plan: WindowPlan, latents: list[Tensor]) -> np.ndarray:
    splicer = Splicer(plan)
    return np.concatenate([splicer.add(codec.scalar(window).numpy()) for window in latents]).T  # [2, samples]


def snr(got: np.ndarray, wanted: np.ndarray) -> float:
    """Signal-to-noise ratio in dB."""
    return float(10 * np.log10((wanted.astype(np.float64) ** 2).sum() / ((got - wanted).astype(np.float64) ** 2).sum()))


def stored_noise(vectors: Vectors, case: dict[str, Any]) -> list[Tensor]:
    return [vectors["noise"][index].float() for index in case["noise_index"]]


def test_the_conditioning_is_the_references(codec: HeartCodec, vectors: Vectors, cases: dict[str, Any]) -> None:
    codes = vectors["codes"][:, : cases["one"]["L"]].long()
    rows = codec.quantizer.codebook_sum(codes)
    torch.testing.assert_close(rows, vectors["one.codebook_sum"], atol=1e-5, rtol=0)
    out = codec.quantizer.project_out(rows)
    torch.testing.assert_close(out, vectors["one.rvq_out"], atol=1e-5, rtol=0)
    mu = codec.quantizer.cond_feature_emb(out)
    torch.testing.assert_close(mu, vectors["one.mu_before_x2"], atol=1e-5, rtol=0)
    twice = codec.quantizer(codes)
    torch.testing.assert_close(twice[0::2], mu)
    torch.testing.assert_close(twice[1::2], mu)


def test_a_code_beyond_its_codebook_adds_nothing(codec: HeartCodec, vectors: Vectors) -> None:
    codes = vectors["codes"][:, :3].long().clone()
    without = codec.quantizer.codebook_sum(codes) - codec.quantizer.embed[2][codes[2]]
    for beyond in (codec.config.codebook_size, codec.config.codebook_size + 4, -1):
        codes[2] = beyond
        torch.testing.assert_close(codec.quantizer.codebook_sum(codes), without, atol=1e-6, rtol=0)


def test_the_time_embedding_is_the_references(codec: HeartCodec, vectors: Vectors, cases: dict[str, Any]) -> None:
    schedule = Schedule(codec.estimator, cases["one"]["num_steps"])
    assert torch.equal(schedule.times, vectors["one.euler_t"])
    # Angles reach 1,000, where fp32 has steps of 6e-5.
    torch.testing.assert_close(time_features(schedule.times)[5], vectors["one.temb512.step5"], atol=1e-4, rtol=0)
    modulation = schedule.modulation
    torch.testing.assert_close(modulation.first[5].flatten(), vectors["one.adaln_mod.step5"], atol=1e-5, rtol=0)
    torch.testing.assert_close(modulation.first_embedding[5, 0], vectors["one.adaln_emb.step5"], atol=1e-5, rtol=0)


def test_one_window_is_the_references_step_by_step(codec: HeartCodec, vectors: Vectors, cases: dict[str, Any]) -> None:
    case, rows = cases["one"], cases["latent_frame_subset"]
    plan = plan_of(codec, case)
    mu = conditioning(codec, vectors, plan, 0)
    context = torch.zeros(0, codec.config.out_channels)
    schedule = Schedule(codec.estimator, case["num_steps"])
    solver = EulerSolver(codec.estimator, schedule, mu, stored_noise(vectors, case)[0], context, case["guidance_scale"])
    for step in range(case["num_steps"]):
        wanted = vectors.get(f"one.x_in.step{step}")
        if wanted is not None:
            here = solver.latents[rows[: len(wanted)]]
            torch.testing.assert_close(here, wanted, atol=1e-4, rtol=0)
        if (velocity := vectors.get(f"one.est_out.step{step}")) is not None:
            out = codec.estimator(solver.inputs(), schedule.modulation, step)
            torch.testing.assert_close(out[:, rows], velocity, atol=1e-4, rtol=0)
        solver.step()
    torch.testing.assert_close(solver.latents, vectors["one.latents"], atol=1e-4, rtol=0)
    assert snr(waveform(codec, plan, [solver.latents]), vectors["one.wav"].numpy()) > 40


def test_without_guidance_one_row_is_enough(codec: HeartCodec, vectors: Vectors, cases: dict[str, Any]) -> None:
    plan = plan_of(codec, cases["one"])
    (latents,) = solve(codec, vectors, cases, plan, stored_noise(vectors, cases["one"]), guidance=1.0)
    wanted = vectors["one_gs1.latents_sub"]
    torch.testing.assert_close(latents[cases["latent_frame_subset"]], wanted, atol=1e-4, rtol=0)


def test_the_scalar_decoder_makes_the_references_audio_of_its_latents(codec: HeartCodec, vectors: Vectors) -> None:
    got = codec.scalar(vectors["one.latents"])
    torch.testing.assert_close(got, vectors["one.wav"], atol=1e-5, rtol=0)


def test_songs_of_two_windows_are_the_references(codec: HeartCodec, vectors: Vectors, cases: dict[str, Any]) -> None:
    case, rows = cases["two"], cases["latent_frame_subset"]
    plan = plan_of(codec, case)
    assert plan.count == case["windows"]
    latents = solve(codec, vectors, cases, plan, stored_noise(vectors, case))
    for window in range(plan.count):
        torch.testing.assert_close(latents[window][rows], vectors[f"two.latents_sub.w{window}"], atol=1e-4, rtol=0)
    assert snr(waveform(codec, plan, latents), vectors["two.wav"].numpy()) > 40


@pytest.mark.parametrize(
    "name", ["short", "three", "buglen", "full_short", "full_one", "full_bug", "full_three", "full_four"]
)
def test_songs_of_every_length_have_their_samples(
    codec: HeartCodec, vectors: Vectors, cases: dict[str, Any], name: str
) -> None:
    case = cases[name]
    plan = plan_of(codec, case)
    noise = reference_noise(plan, case["seed"], codec.config.out_channels)
    for draw, wanted in zip(noise, (d for d in case["rng"] if d["call"] == "noise"), strict=False):
        np.testing.assert_allclose(draw.flatten()[:4].numpy(), wanted["head"], atol=1e-6)
    got = waveform(codec, plan, solve(codec, vectors, cases, plan, noise))
    assert got.shape == (2, case["expected_target_len"])
    assert np.isfinite(got).all()
    lost_tail = case["wav"][1] < case["expected_target_len"]
    # Where the reference loses the last window, ours cross-fades into it: compare what comes before.
    same = case["wav"][1] - (plan.overlap_samples if lost_tail else 0)
    if f"{name}.wav" in vectors:
        assert snr(got[:, :same], vectors[f"{name}.wav"].numpy()[:, :same]) > 40
    else:
        index = vectors[f"{name}.wav_idx"].numpy()
        kept = index < same
        assert kept.sum() > 100
        assert snr(got[:, index[kept]], vectors[f"{name}.wav_at_idx"].numpy()[:, kept]) > 40
    if lost_tail:
        tail = got[:, case["wav"][1] :]
        assert np.sqrt((tail**2).mean()) > 0.3 * case["wav_rms"], "the end of the song is there, and it sounds"
    else:
        assert plan.count == case["windows"]
        assert np.sqrt((got**2).mean()) == pytest.approx(case["wav_rms"], rel=1e-3)
        np.testing.assert_allclose(got.sum(axis=1), case["wav_sum"], atol=1e-4 * got.shape[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(
    codec: HeartCodec, golden_checkpoint: Checkpoint, vectors: Vectors, cases: dict[str, Any], dtype: torch.dtype
) -> None:
    half = HeartCodec(golden_checkpoint.codec, dtype).requires_grad_(False)
    load_weights(half, golden_checkpoint.codec_path)
    plan = plan_of(codec, cases["one"])
    (latents,) = solve(half, vectors, cases, plan, stored_noise(vectors, cases["one"]))
    assert latents.dtype == torch.float32
    wanted = vectors["one.latents"]
    assert snr(latents.numpy(), wanted.numpy()) > (25 if dtype is torch.bfloat16 else 40)


def spectra(audio: Tensor, size: int) -> Tensor:
    """Magnitudes of a short-time Fourier transform, floored 80 dB below their peak."""
    magnitudes = torch.stft(audio, size, size // 4, window=torch.hann_window(size), return_complex=True).abs()
    return magnitudes.clamp_min(1e-4 * magnitudes.max())


def test_bfloat16_keeps_the_spectrum(
    codec: HeartCodec, golden_checkpoint: Checkpoint, vectors: Vectors, cases: dict[str, Any]
) -> None:
    """The difference is that of a change of the noise by one or two thousandths, and a thirtieth of another seed's."""
    half = HeartCodec(golden_checkpoint.codec, torch.bfloat16).requires_grad_(False)
    load_weights(half, golden_checkpoint.codec_path)
    plan = plan_of(codec, cases["one"])
    (latents,) = solve(half, vectors, cases, plan, stored_noise(vectors, cases["one"]))
    got, wanted = codec.scalar(latents), vectors["one.wav"]
    assert snr(got.numpy(), wanted.numpy()) > 32
    for size in (512, 1024, 2048):
        a, b = spectra(got, size), spectra(wanted, size)
        assert (a - b).norm() / b.norm() < 0.02
        assert (20 * (a / b).log10()).abs().mean() < 0.4  # dB
