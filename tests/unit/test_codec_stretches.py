"""The scalar decoder in stretches: the same waveform, in memory that does not depend on the window."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from services.codec_worker.engines.native import NativeCodec, noise
from services.codec_worker.model import ConvCache, EulerSolver, HeartCodec, Schedule, WindowPlan, load_weights
from shared.model.checkpoint import Checkpoint, open_checkpoint

DEMO = Path(__file__).parents[2] / "ckpt/demo"
LATENTS = 150


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(DEMO)


@pytest.fixture(scope="module")
def codec(checkpoint: Checkpoint) -> Iterator[HeartCodec]:
    model = HeartCodec(checkpoint.codec, torch.float32)
    load_weights(model, checkpoint.codec_path)
    with torch.inference_mode():
        yield model.requires_grad_(False)


@pytest.fixture(scope="module")
def latents(checkpoint: Checkpoint) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(LATENTS, checkpoint.codec.out_channels, generator=generator)


@pytest.mark.parametrize("length", [1, 7, 62, 149])
def test_stretches_join_to_the_waveform_of_the_window(codec: HeartCodec, latents: torch.Tensor, length: int) -> None:
    whole, conv_cache = codec.scalar(latents), ConvCache()
    starts = range(0, LATENTS, length)
    joined = torch.cat([codec.scalar(latents, at, min(at + length, LATENTS), conv_cache) for at in starts], dim=1)
    torch.testing.assert_close(joined, whole, atol=1e-6, rtol=1e-5)


def test_what_is_carried_is_the_same_after_every_stretch_of_any_length(
    codec: HeartCodec, latents: torch.Tensor
) -> None:
    sizes = set()
    for length in (25, 75):
        conv_cache = ConvCache()
        for start in range(0, LATENTS, length):
            codec.scalar(latents, start, start + length, conv_cache)
            sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in conv_cache._last.values()))
    assert len(sizes) == 1


def test_a_short_song_sounds_as_the_window_that_it_fills_sounds(codec: HeartCodec, checkpoint: Checkpoint) -> None:
    """Only the part of the window that the song needs becomes a waveform, and its samples are the same."""
    frames, seed = 63, 5
    engine = NativeCodec(checkpoint, "cpu", "float32")
    engine.load()
    engine.to_device()
    codes = np.random.default_rng(0).integers(0, checkpoint.codec.codebook_size, (8, frames), dtype=np.int16)
    audio = np.concatenate([step.audio for step in engine.decode(codes, seed=seed) if step.audio is not None])

    plan = WindowPlan(frames, checkpoint.codec.sample_rate)
    channels = checkpoint.codec.out_channels
    solver = EulerSolver(
        codec.estimator,
        Schedule(codec.estimator),
        codec.quantizer(torch.from_numpy(plan.cut(codes, 0)).long()),
        noise(seed, 0, plan, channels),
        torch.zeros(0, channels),
        1.25,
    )
    while not solver.finished:
        solver.step()
    whole = codec.scalar(solver.latents).numpy()
    np.testing.assert_allclose(audio.T, whole[:, : plan.samples], atol=1e-5)
