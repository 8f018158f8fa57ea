"""Golden vectors on the device, in float32, bfloat16 and float16: the language model, then the codec."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.codec_worker.engines.native import NativeCodec
from services.codec_worker.model import EulerSolver, fused_attention, products
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import kernels
from shared.model.checkpoint import Checkpoint
from shared.model.prompt import Prompt, Prompter
from tests.golden.test_codec import plan_of, snr
from tests.gpu.conftest import DEMO
from tests.gpu.engines import advance, codes_of, generate, ready, songs_of, stacked

Vectors = dict[str, Tensor]
HALVES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@pytest.fixture(scope="module")
def vectors(golden: Path) -> Vectors:
    return load_file(golden / "lm.safetensors")


@pytest.fixture(scope="module")
def facts(golden: Path) -> Any:
    return json.loads((golden / "lm.json").read_text())


@pytest.fixture(scope="module")
def prompt(facts: Any, golden_checkpoint: Checkpoint) -> Prompt:
    return Prompter(golden_checkpoint).encode(facts["prompt"]["tags"], facts["prompt"]["lyrics"])


Draw = Callable[[int, int, Tensor], Tensor]
"""(frame, codebook, logits ``[rows, Va]`` before guidance) → the code, int64 ``[1]``, on the device."""


@torch.inference_mode()
def run(engine: NativeEngine, prompt: Prompt, rows: int, frames: int, draw: Draw) -> Tensor:
    """Logits before guidance of so many frames of a song, ``[T, codebooks, rows, Va]``, its codes chosen by `draw`."""
    model = engine._model
    cache, depth = model.backbone_cache(rows, prompt.length + frames), model.depth_cache(rows)
    hidden = model.advance(model.embed_prompt(prompt.tags, prompt.lyrics, rows), cache, 0)
    logits: list[Tensor] = []
    for index in range(frames):

        def choose(book: int, raw: Tensor, index: int = index) -> Tensor:
            logits.append(raw)
            return draw(index, book, raw)

        frame = model.frame(hidden, depth, choose)
        hidden = model.advance(model.embed_frames(frame.expand(rows, 1, -1)), cache, prompt.length + index)
    return torch.stack(logits).view(frames, -1, *logits[0].shape).cpu()


def forced(engine: NativeEngine, prompt: Prompt, codes: Tensor, rows: int) -> Tensor:
    """Logits along a given song, int ``[T, codebooks]``."""
    fed = codes.long().to(engine._device)
    return run(engine, prompt, rows, len(codes), lambda index, book, _: fed[index, book : book + 1])


def test_logits_are_the_references_in_float32(
    device: str, cfg: str, vectors: Vectors, prompt: Prompt, golden_checkpoint: Checkpoint
) -> None:
    wanted = vectors[f"forced.cfg{cfg}.fp32.raw_logits"]
    got = forced(ready(golden_checkpoint, device), prompt, vectors["forced_frames"], wanted.shape[2])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@HALVES
def test_logits_in_half_precision_are_as_near_as_the_references(
    device: str, dtype: str, cfg: str, vectors: Vectors, prompt: Prompt, golden_checkpoint: Checkpoint
) -> None:
    """The measure is how far the reference in bfloat16 is from itself in float32."""
    exact = vectors[f"forced.cfg{cfg}.fp32.raw_logits"]
    noise = (vectors[f"forced.cfg{cfg}.bf16.raw_logits"].float() - exact).abs()
    got = forced(ready(golden_checkpoint, device, dtype), prompt, vectors["forced_frames"], exact.shape[2])
    apart = (got.float() - exact).abs()
    assert apart.mean() < 1.2 * noise.mean()
    assert apart.max() < 1.5 * noise.max()


def test_greedy_frames_are_the_references(
    device: str, cfg: str, vectors: Vectors, prompt: Prompt, golden_checkpoint: Checkpoint
) -> None:
    wanted = vectors[f"greedy.cfg{cfg}.fp32.frames"]  # [8, T]
    song = Song(prompt=prompt, max_frames=wanted.shape[1], temperature=0, cfg_scale=float(cfg))
    for way in ("graphs", "loop"):
        got = generate(ready(golden_checkpoint, device, way=way), song)
        assert np.array_equal(got, wanted.numpy()), way


def test_draws_with_recorded_noise_are_the_references(
    device: str, cfg: str, facts: Any, vectors: Vectors, prompt: Prompt, golden_checkpoint: Checkpoint
) -> None:
    case = f"sample.cfg{cfg}.fp32"
    wanted, noise = vectors[f"{case}.frames"], vectors[f"{case}.q"].to(device)  # [8, T], [T, 8, 1, Va]
    rows, recorded = 1 if float(cfg) == 1 else 2, facts["cases"][case]
    numbers = [
        torch.tensor([recorded["temperature"]], device=device),
        torch.tensor([recorded["topk"]], device=device),
        torch.tensor([float(cfg)], device=device),
        torch.ones(1, dtype=torch.int64, device=device),  # its length, which is its least one
        torch.ones(1, dtype=torch.int64, device=device),
    ]
    drawn: list[Tensor] = []

    def draw(index: int, book: int, logits: Tensor) -> Tensor:
        both = logits if rows == 2 else torch.cat((logits, logits))
        drawn.append(kernels.sample(both.contiguous(), noise[index, book], *numbers, 0))
        return drawn[-1]

    run(ready(golden_checkpoint, device), prompt, rows, wanted.shape[1], draw)
    assert torch.equal(torch.cat(drawn).view(-1, len(wanted)).T.cpu(), wanted.long())


@pytest.mark.parametrize("name", ["golden", "demo"])
def test_seeded_songs_are_those_of_the_cpu(device: str, name: str, golden_checkpoint: Checkpoint) -> None:
    """Songs of every kind made side by side on the device, in float32, beside each alone on the CPU."""
    checkpoint = golden_checkpoint if name == "golden" else DEMO
    songs = songs_of(checkpoint, 14)
    engine = ready(checkpoint, device, slots=len(songs), way="graphs")
    made: dict[str, list[np.ndarray]] = {song_id: [] for song_id in songs}
    for song_id, song in songs.items():
        engine.admit(song_id, song)
    advance(engine, made)
    for song_id, song in songs.items():
        assert np.array_equal(stacked(made[song_id]), generate(ready(checkpoint, "cpu"), song)), song_id


# The codec


@pytest.fixture(scope="module")
def codec_vectors(golden: Path) -> Vectors:
    return load_file(golden / "codec.safetensors")


@pytest.fixture(scope="module")
def case(golden: Path) -> Any:
    """The recorded song of one window."""
    return json.loads((golden / "codec.json").read_text())["one"]


def codec_on(checkpoint: Checkpoint, device: str, dtype: str, case: Any) -> NativeCodec:
    engine = NativeCodec(checkpoint, device, dtype, steps=case["num_steps"], guidance=case["guidance_scale"])
    engine.load()
    engine.to_device()
    return engine


@torch.inference_mode()
def latents_of(engine: NativeCodec, vectors: Vectors, case: Any) -> Tensor:
    """Latents of the recorded song, from its own noise, fp32 ``[T, 256]`` on the device."""
    model, schedule, device = engine._model, engine._ready, engine._device
    assert schedule is not None
    plan = plan_of(model, case)
    codes = vectors["codes"][:, : plan.frames].numpy().astype(np.int16)
    mu = model.quantizer(torch.from_numpy(plan.cut(codes, 0)).long().to(device))
    start = vectors["noise"][case["noise_index"][0]].float().to(device)
    context = torch.zeros(0, model.config.out_channels, device=device)
    solver = EulerSolver(model.estimator, schedule, mu, start, context, case["guidance_scale"])
    with fused_attention():
        while not solver.finished:
            solver.step()
    return solver.latents


def test_latents_and_waveform_are_the_references_in_float32(
    device: str, codec_vectors: Vectors, case: Any, golden_checkpoint: Checkpoint
) -> None:
    engine = codec_on(golden_checkpoint, device, "float32", case)
    with products(tf32=False), torch.inference_mode():
        latents = latents_of(engine, codec_vectors, case)
        waveform = engine._model.scalar(codec_vectors["one.latents"].to(device))
        whole = engine._model.scalar(latents)
    torch.testing.assert_close(latents.cpu(), codec_vectors["one.latents"], atol=3e-4, rtol=0)
    torch.testing.assert_close(waveform.cpu(), codec_vectors["one.wav"], atol=1e-4, rtol=0)
    assert snr(whole.cpu().numpy(), codec_vectors["one.wav"].numpy()) > 40


@pytest.mark.parametrize(
    ("dtype", "tf32", "least"),
    [
        ("float32", (True, False), 35),
        ("float32", (True, True), 30),
        ("bfloat16", (False, False), 32),
        ("float16", (False, False), 40),
    ],
)
def test_the_waveform_stays_close_in_every_precision(
    device: str,
    dtype: str,
    tf32: tuple[bool, bool],
    least: float,
    codec_vectors: Vectors,
    case: Any,
    golden_checkpoint: Checkpoint,
    say: Callable[..., None],
) -> None:
    engine = codec_on(golden_checkpoint, device, dtype, case)
    with torch.inference_mode():
        with products(tf32=tf32[0]):
            latents = latents_of(engine, codec_vectors, case)
        with products(tf32=tf32[1]):
            waveform = engine._model.scalar(latents)
    found = snr(waveform.cpu().numpy(), codec_vectors["one.wav"].numpy())
    if device != "cpu":
        say(dtype=dtype, tf32_estimator=tf32[0], tf32_waveform=tf32[1], snr_db=round(found, 1))
    assert found > least


def test_whole_songs_sound_as_on_the_cpu(device: str, golden_checkpoint: Checkpoint) -> None:
    codes = codes_of(golden_checkpoint, 30)
    songs = []
    for where in (device, "cpu"):
        engine = NativeCodec(golden_checkpoint, where, "float32", steps=2)
        engine.load()
        engine.to_device()
        songs.append(np.concatenate([step.audio for step in engine.decode(codes, seed=3) if step.audio is not None]))
    assert songs[0].shape == songs[1].shape
    assert np.array_equal(songs[0], songs[1]) or snr(songs[0], songs[1]) > 30
