"""Sampling in the native token engine: seeds, guidance, top-k, and the songs that result."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import Sampler, heartmula
from services.tokenizer_worker.model.kernels.noise import counter, exponential_noise, mix, noise_counters
from shared.model.prompt import Prompt
from tests.unit.native_engines import TINY, generate, one_thread, prompt_of, ready  # noqa: F401

PROMPT = prompt_of(TINY)


@pytest.fixture
def engine() -> NativeEngine:
    return ready(TINY)


def test_same_seed_same_song(engine: NativeEngine) -> None:
    song = Song(prompt=PROMPT, max_frames=12, topk=5, seed=3)
    first = generate(engine, song)
    other = generate(engine, dataclasses.replace(song, seed=4))
    torch.manual_seed(99)
    torch.rand(3)
    assert np.array_equal(generate(engine, song), first), "neither songs before nor torch's own generator may matter"
    assert not np.array_equal(other, first)


def test_every_frame_has_noise_of_its_own(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def record(*arguments: Any) -> Tensor:
        drawn.append(exponential_noise(*arguments))
        return drawn[-1]

    monkeypatch.setattr(heartmula, "exponential_noise", record)
    generate(engine, Song(prompt=PROMPT, max_frames=4, topk=5, seed=3))
    assert len({tuple(row.tolist()) for row in torch.cat(drawn)}) == 4 * 8


def test_temperature_0_ignores_the_seed(engine: NativeEngine) -> None:
    song = Song(prompt=PROMPT, max_frames=6, temperature=0, seed=1)
    assert np.array_equal(generate(engine, song), generate(engine, dataclasses.replace(song, seed=2, topk=1)))


def test_guidance_below_1_is_guidance(engine: NativeEngine) -> None:
    """At 0 only the unconditional row counts, so the prompt has no effect; between 0 and 1 it has."""
    other = Prompt(PROMPT.tags, PROMPT.lyrics[::-1])

    def songs(cfg_scale: float) -> list[list[list[int]]]:
        return [
            generate(engine, Song(prompt=p, max_frames=6, temperature=0, cfg_scale=cfg_scale)).tolist()
            for p in (PROMPT, other)
        ]

    assert songs(0)[0] == songs(0)[1]
    assert songs(0.5)[0] != songs(0.5)[1]
    assert songs(0.5)[0] != songs(1)[0]


def test_draws_follow_the_probabilities_of_the_top_k() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 1.0, 1.5]])
    generator = torch.Generator().manual_seed(1)
    sampler = Sampler([0.7], [3], [1])
    count = torch.zeros(5)
    draws = 4000
    for _ in range(draws):
        count[sampler.draw(logits, torch.empty(1, 5).exponential_(1, generator=generator))] += 1
    # The third largest is there twice; only the 0 is out.
    p = torch.tensor([2.0, 1.0, -torch.inf, 1.0, 1.5]).div(0.7).softmax(0)
    assert count[2] == 0
    assert ((count / draws - p).abs() < 5 * (p * (1 - p) / draws).sqrt() + 1e-9).all()


def test_topk_beyond_the_vocabulary_drops_nothing() -> None:
    noise = torch.tensor([[1e3, 1e3, 1e-3]])
    assert Sampler([1], [50], [1]).draw(torch.tensor([[1.0, 1.0, 0.0]]), noise).tolist() == [2]


def test_greedy_takes_the_guided_maximum() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.0, 0.0]])  # guided at 2: 1.0, 1.8, 0.0
    assert Sampler([0], [50], [2]).draw(logits, torch.ones(1, 3)).tolist() == [1]
    assert Sampler([0], [50], [1]).draw(logits[:1], torch.ones(1, 3)).tolist() == [0]


def test_songs_of_a_batch_are_drawn_each_in_its_own_way() -> None:
    """Guided songs come first; rows: conditional ones of all, unconditional ones of the guided."""
    songs = [(0.7, 3, 2.0), (0, 50, 1.5), (1.3, 100, 0.5), (1.0, 1, 1), (2.0, 20, 1)]  # temperature, top-k, cfg
    generator = torch.Generator().manual_seed(5)
    codes = set()
    for _ in range(20):
        logits = torch.randn(8, 40, generator=generator)
        noise = torch.empty(5, 40).exponential_(1, generator=generator)
        together = Sampler([s[0] for s in songs], [s[1] for s in songs], [s[2] for s in songs]).draw(logits, noise)
        for index, (temperature, topk, cfg_scale) in enumerate(songs):
            rows = logits[index::5]
            alone = Sampler([temperature], [topk], [cfg_scale]).draw(rows, noise[index : index + 1])
            assert together[index] == alone, index
        conditional, unconditional = logits[1], logits[6]
        assert together[1] == (unconditional + (conditional - unconditional) * 1.5).argmax()
        assert together[3] == logits[3].argmax()
        codes.add(tuple(together.tolist()))
    assert len(codes) == 20


def test_counters_are_splitmix64() -> None:
    """The expected values are those published with the algorithm, for seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    outputs = mix(torch.tensor([counter(1234567, frame) for frame in range(4)]))
    assert [int(output) % 2**64 for output in outputs] == published
    assert counter(1234567, 3) == counter(1234567 + 2**64, 3)


def test_noise_is_exponential_and_depends_on_song_and_frame_alone() -> None:
    within = noise_counters(8, 8197)
    seeds = mix(torch.tensor([counter(seed, frame) for seed in (0, 1, 2**63) for frame in (0, 1, 1500)]))
    noise = torch.stack([exponential_noise(seeds, row) for row in within])  # [8, 9, 8197]
    assert noise.dtype == torch.float32
    assert noise.min() > 0
    for index in range(9):
        assert torch.equal(exponential_noise(seeds[index : index + 1], within[3])[0], noise[3, index])
    # Of n values below x a part of 1 - exp(-x); five standard deviations around it, also in the tails.
    values = noise.double().flatten()
    for x in (1e-4, 0.01, 0.5, 1.0, 3.0, 9.0):
        p = -np.expm1(-x)
        assert abs(float((values < x).double().mean()) - p) < 5 * (p * (1 - p) / len(values)) ** 0.5
    together = torch.corrcoef(noise.flatten(0, 1))  # of codebooks and frames, neighbours included
    assert (together - torch.eye(72)).abs().max() < 6 / 8197**0.5
