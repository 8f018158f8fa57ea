"""The native language model against vectors recorded from the reference. Dimensions come from the checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import HeartMuLa, Sampler, heartmula, load_weights
from shared.model.checkpoint import Checkpoint
from shared.model.prompt import Prompt, Prompter
from tests.unit.native_engines import one_thread  # noqa: F401

FP32 = 1e-4  # largest absolute difference allowed; observed: 5e-6


@pytest.fixture(scope="module")
def facts(golden: Path) -> Any:
    return json.loads((golden / "lm.json").read_text())


@pytest.fixture(scope="module")
def vectors(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "lm.safetensors")


@pytest.fixture(scope="module")
def prompt(facts: Any, golden_checkpoint: Checkpoint) -> Prompt:
    return Prompter(golden_checkpoint).encode(facts["prompt"]["tags"], facts["prompt"]["lyrics"])


@pytest.fixture(scope="module")
def engine(golden_checkpoint: Checkpoint) -> NativeEngine:
    engine = NativeEngine(golden_checkpoint, "cpu", "float32")
    engine.load()
    engine.to_device()
    return engine


def generate(engine: NativeEngine, song: Song) -> np.ndarray:
    """All frames of a song, ``[codebooks, T]`` as the reference returns them."""
    engine.admit("song", song)
    frames = []
    while (frame := engine.step()["song"]) is not None:
        frames.append(frame)
    return np.stack(frames, axis=1) if frames else np.zeros((8, 0), np.int16)


# Prompts


def test_prompts_have_the_references_layouts(facts: Any, golden_checkpoint: Checkpoint) -> None:
    prompter = Prompter(golden_checkpoint)
    assert len(facts["preprocess"]) >= 6
    for case in facts["preprocess"]:
        prompt = prompter.encode(case["tags"], case["lyrics"])
        assert [*prompt.tags, 0, *prompt.lyrics] == case["text_column"], case["tags"]
        assert {len(prompt.tags)} == set(case["muq_idx"])
        assert prompt.length == case["shape"][1]


def test_prompt_tensors_are_the_references(cfg: str, facts: Any, vectors: dict[str, Tensor], prompt: Prompt) -> None:
    """The reference's input tensors follow from a `Prompt` and the number of rows alone."""
    tokens = vectors[f"prompt.cfg{cfg}.tokens"]  # [rows, P, 9]
    rows = 1 if float(cfg) == 1 else 2
    assert tokens.shape[:2] == (rows, prompt.length)
    assert facts[f"muq_idx.cfg{cfg}"] == [len(prompt.tags)] * rows
    for row in range(rows):
        assert tokens[row, :, -1].tolist() == [*prompt.tags, 0, *prompt.lyrics]
        assert vectors[f"prompt.cfg{cfg}.pos"][row].tolist() == list(range(prompt.length))
    assert not tokens[:, :, :-1].any()
    mask = vectors[f"prompt.cfg{cfg}.tokens_mask"]
    assert mask[:, :, -1].all()
    assert not mask[:, :, :-1].any()
    assert not vectors[f"prompt.cfg{cfg}.muq_embed"].any()


# Logits under teacher forcing


@dataclass
class Forced:
    """All that the model computed while the recorded codes were fed back to it."""

    embedded: Tensor  # [rows, P, D]
    prefilled: Tensor  # [rows, P, D], after the final norm
    hidden: Tensor  # [T, rows, D]
    logits: Tensor  # [T, codebooks, rows, Va], before guidance


@torch.inference_mode()
def force(checkpoint: Checkpoint, dtype: torch.dtype, prompt: Prompt, codes: Tensor, rows: int) -> Forced:
    model = HeartMuLa(checkpoint.lm, dtype)
    load_weights(model, checkpoint.lm_path)
    frames = codes.shape[0]
    cache, depth_cache = model.backbone_cache(rows, prompt.length + frames), model.depth_cache(rows)
    embedded = model.embed_prompt(prompt.tags, prompt.lyrics, rows)
    prefilled = model.backbone.norm(model.backbone(embedded, cache, 0))
    hidden, logits = [prefilled[:, -1]], []

    for index, frame in enumerate(codes.long()):
        seen: list[Tensor] = []

        def choose(codebook: int, raw: Tensor, frame: Tensor = frame, seen: list[Tensor] = seen) -> Tensor:
            seen.append(raw)
            return frame[codebook : codebook + 1]

        assert torch.equal(model.frame(hidden[-1], depth_cache, choose), frame[None])
        logits.append(torch.stack(seen))
        if index + 1 < frames:
            hidden.append(model.advance(model.embed_frames(frame.expand(rows, 1, -1)), cache, prompt.length + index))
    return Forced(embedded, prefilled, torch.stack(hidden), torch.stack(logits))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=FP32, rtol=0)


def test_logits_along_recorded_songs_are_the_references_in_fp32(
    cfg: str, vectors: dict[str, Tensor], prompt: Prompt, golden_checkpoint: Checkpoint
) -> None:
    case = f"forced.cfg{cfg}.fp32"
    theirs = vectors[f"{case}.raw_logits"]
    forced = force(golden_checkpoint, torch.float32, prompt, vectors["forced_frames"], theirs.shape[2])
    assert torch.equal(forced.embedded, vectors[f"{case}.prefill_h"])
    close(forced.prefilled, vectors[f"{case}.prefill_out"])
    close(forced.hidden, vectors[f"{case}.last_h"])
    close(forced.logits, theirs)


def test_logits_along_recorded_songs_are_near_the_references_in_bf16(
    cfg: str, vectors: dict[str, Tensor], prompt: Prompt, golden_checkpoint: Checkpoint
) -> None:
    """Two bf16 runs that add in different orders cannot agree better than either agrees with the truth.

    The measure is the reference itself: how far its bf16 logits are from its fp32 logits. Observed on logits up to
    6.6: theirs is 0.011 from fp32 on average, at most 0.14; ours is as far from fp32, and 0.008 and 0.07 from theirs.
    """
    exact = vectors[f"forced.cfg{cfg}.fp32.raw_logits"]
    theirs = vectors[f"forced.cfg{cfg}.bf16.raw_logits"]
    ours = force(golden_checkpoint, torch.bfloat16, prompt, vectors["forced_frames"], theirs.shape[2]).logits
    assert ours.dtype == theirs.dtype == torch.bfloat16
    noise = (theirs.float() - exact).abs()
    apart = (ours.float() - theirs.float()).abs()
    assert apart.mean() < noise.mean()
    assert apart.max() < 1.5 * noise.max()
    assert (ours.float() - exact).abs().mean() < 1.2 * noise.mean()
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.95  # observed: 0.985


# Frames


def test_greedy_frames_are_the_references(
    cfg: str, vectors: dict[str, Tensor], prompt: Prompt, engine: NativeEngine
) -> None:
    theirs = vectors[f"greedy.cfg{cfg}.fp32.frames"]  # [8, T]
    song = Song(prompt=prompt, max_frames=theirs.shape[1], temperature=0, cfg_scale=float(cfg))
    assert np.array_equal(generate(engine, song), theirs.numpy())


def test_sampled_frames_are_the_references(
    cfg: str,
    facts: Any,
    vectors: dict[str, Tensor],
    prompt: Prompt,
    engine: NativeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the recorded noise, every draw equals the reference's."""
    case = f"sample.cfg{cfg}.fp32"
    theirs, q = vectors[f"{case}.frames"], vectors[f"{case}.q"]  # [8, T], [T, 8, 1, Va]
    noise = iter(q.flatten(0, 1))  # [1, Va] a draw
    guided: list[Tensor] = []
    guide = Sampler.guide

    def guide_and_record(sampler: Sampler, logits: Tensor) -> Tensor:
        guided.append(guide(sampler, logits))
        return guided[-1]

    monkeypatch.setattr(heartmula, "exponential_noise", lambda *_: next(noise))
    monkeypatch.setattr(Sampler, "guide", guide_and_record)
    recorded = facts["cases"][case]
    song = Song(
        prompt=prompt,
        max_frames=theirs.shape[1],
        temperature=recorded["temperature"],
        topk=recorded["topk"],
        cfg_scale=float(cfg),
    )
    assert np.array_equal(generate(engine, song), theirs.numpy())
    expected = vectors[f"{case}.guided_logits"].flatten(0, 2)  # [T · 8, Va]
    close(torch.cat(guided), expected)


# The end


def test_a_song_ends_where_the_references_does(
    facts: Any, vectors: dict[str, Tensor], prompt: Prompt, engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A code at or above `audio_eos_id` ends the song and its frame is dropped; special codes below it pass."""
    whole = max(case["returned_shape"][1] for case in facts["eos"].values())
    for name, case in facts["eos"].items():
        codes = vectors["forced_frames"].long().clone()  # [T, 8]
        codes[case["frame"], case["codebook"]] = case["value"]
        frames = iter(codes)
        monkeypatch.setattr(HeartMuLa, "frame", lambda *_, frames=frames: next(frames)[None])
        ours = generate(engine, Song(prompt=prompt, max_frames=whole))
        if case["frame"] == 0:
            # The reference does not look at its first frame, and would hand an end token to the codec.
            assert case["returned_contains_value"]
            assert ours.shape[1] == 0, name
        else:
            assert list(ours.shape) == case["returned_shape"], name
            assert (case["value"] in ours) == case["returned_contains_value"], name


def test_a_song_has_no_frame_more_than_asked_for(prompt: Prompt, engine: NativeEngine) -> None:
    """The reference makes a first frame and then as many as the duration holds: one too many."""
    assert generate(engine, Song(prompt=prompt, max_frames=3, temperature=0)).shape[1] == 3
