"""The native token engine's behaviour, and how it reads checkpoints. Its numbers are checked in tests/golden."""

import dataclasses
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.tokenizer_worker import native
from services.tokenizer_worker.engine import Song
from services.tokenizer_worker.model import (
    HeartMuLa,
    KVCache,
    Sampler,
    exponential_noise,
    frame_seed,
    load_weights,
    weights,
)
from services.tokenizer_worker.native import NativeEngine
from shared.checkpoint import Checkpoint, open_checkpoint, tensors
from shared.errors import ConfigError, DeviceFull, PhaseError, SongError
from shared.prompt import Prompt, Prompter

CHECKPOINT = Path(__file__).parents[1] / "golden/data/ckpt"
Frames = list[list[int]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def prompt(checkpoint: Checkpoint) -> Prompt:
    return Prompter(checkpoint).encode("piano", "la la la")


@pytest.fixture
def engine(checkpoint: Checkpoint) -> NativeEngine:
    return ready(checkpoint)


def ready(checkpoint: Checkpoint, dtype: str = "float32") -> NativeEngine:
    engine = NativeEngine(checkpoint, "cpu", dtype)
    engine.load()
    engine.to_device()
    return engine


def generate(engine: NativeEngine, song: Song) -> Frames:
    engine.admit("song", song)
    frames = []
    while (frame := engine.step()["song"]) is not None:
        assert frame.dtype == np.int16
        frames.append(frame.tolist())
    return frames


# Songs


def test_same_seed_same_song(engine: NativeEngine, prompt: Prompt) -> None:
    song = Song(prompt=prompt, max_frames=12, topk=5, seed=3)
    first = generate(engine, song)
    other = generate(engine, dataclasses.replace(song, seed=4))
    torch.manual_seed(99)
    torch.rand(3)
    assert generate(engine, song) == first, "neither songs before nor torch's own generator may matter"
    assert other != first


def test_every_frame_has_noise_of_its_own(
    engine: NativeEngine, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []

    def record(*arguments: Any) -> Tensor:
        drawn.append(exponential_noise(*arguments))
        return drawn[-1]

    monkeypatch.setattr(native, "exponential_noise", record)
    generate(engine, Song(prompt=prompt, max_frames=4, topk=5, seed=3))
    assert len({tuple(row.tolist()) for row in torch.cat(drawn)}) == 4 * 8


def test_ends_at_max_frames_and_leaves_the_batch(engine: NativeEngine, prompt: Prompt) -> None:
    engine.admit("song", Song(prompt=prompt, max_frames=2, temperature=0))
    assert [engine.step()["song"] is None for _ in range(3)] == [False, False, True]
    assert engine.step() == {}


@pytest.mark.parametrize("at", [0, 3])
def test_an_end_token_ends_a_song_before_its_frame(
    at: int, engine: NativeEngine, checkpoint: Checkpoint, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter(range(10))
    end = checkpoint.gen.audio_eos_id

    def frame(*_: object) -> Tensor:
        return torch.tensor([end - 1] * 7 + [end if next(made) == at else 0])

    monkeypatch.setattr(HeartMuLa, "frame", frame)
    assert generate(engine, Song(prompt=prompt, max_frames=10)) == [[end - 1] * 7 + [0]] * at
    assert engine.step() == {}


def test_temperature_0_ignores_the_seed(engine: NativeEngine, prompt: Prompt) -> None:
    song = Song(prompt=prompt, max_frames=6, temperature=0, seed=1)
    assert generate(engine, song) == generate(engine, dataclasses.replace(song, seed=2, topk=1))


def test_guidance_below_1_is_guidance(engine: NativeEngine, prompt: Prompt) -> None:
    """At 0 only the unconditional row counts, so the words do not; between 0 and 1 they do again."""
    other = Prompt(prompt.tags, prompt.lyrics[::-1])

    def songs(cfg_scale: float) -> list[Frames]:
        return [
            generate(engine, Song(prompt=p, max_frames=6, temperature=0, cfg_scale=cfg_scale)) for p in (prompt, other)
        ]

    assert songs(0)[0] == songs(0)[1]
    assert songs(0.5)[0] != songs(0.5)[1]
    assert songs(0.5)[0] != songs(1)[0]


def test_a_song_may_fill_the_models_positions_but_no_more(checkpoint: Checkpoint, prompt: Prompt) -> None:
    backbone = msgspec.structs.replace(checkpoint.lm.backbone, max_seq_len=prompt.length + 4)
    engine = ready(msgspec.structs.replace(checkpoint, lm=msgspec.structs.replace(checkpoint.lm, backbone=backbone)))
    song = Song(prompt=prompt, max_frames=4, temperature=0)
    assert len(generate(engine, song)) == 4
    with pytest.raises(SongError, match="positions"):
        engine.admit("song", dataclasses.replace(song, max_frames=5))
    assert engine.step() == {}


# Slots, caches, phases


def test_drop_frees_the_slot_and_the_caches(
    engine: NativeEngine, prompt: Prompt, caches: list[weakref.ref[KVCache]]
) -> None:
    song = Song(prompt=prompt, max_frames=5)
    engine.admit("a", song)
    engine.step()
    with pytest.raises(ValueError, match="b"):
        engine.admit("b", song)
    engine.drop("unknown")
    assert all(cache() for cache in caches)
    engine.drop("a")
    assert not any(cache() for cache in caches)
    assert engine.step() == {}
    engine.admit("b", song)
    assert list(engine.step()) == ["b"]


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[KVCache]]:
    """Every cache that is made during the test."""
    made: list[weakref.ref[KVCache]] = []
    init = KVCache.__init__

    def record(self: KVCache, keys: Tensor, values: Tensor) -> None:
        init(self, keys, values)
        made.append(weakref.ref(self))

    monkeypatch.setattr(KVCache, "__init__", record)
    return made


def test_nothing_runs_off_the_device(checkpoint: Checkpoint, prompt: Prompt) -> None:
    engine = NativeEngine(checkpoint, "cpu", "float32")
    song = Song(prompt=prompt, max_frames=2)
    with pytest.raises(PhaseError, match="not loaded"):
        engine.to_device()
    engine.load()
    with pytest.raises(PhaseError, match="not on the device"):
        engine.admit("song", song)
    engine.to_device()
    engine.admit("song", song)
    engine.to_host()
    with pytest.raises(PhaseError, match="not on the device"):
        engine.step()
    engine.to_device()
    assert engine.step() == {}, "leaving the device forgets the songs"


def test_the_cpu_copies_no_weights(checkpoint: Checkpoint) -> None:
    engine = NativeEngine(checkpoint, "cpu", "float32")
    engine.load()
    before = [p.data_ptr() for p in engine._model.parameters()]
    for move in (engine.to_device, engine.to_host):
        move()
        assert [p.data_ptr() for p in engine._model.parameters()] == before


def test_a_full_device_is_reported_and_nothing_is_admitted(
    engine: NativeEngine, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    song = Song(prompt=prompt, max_frames=2)

    def full(*_: object) -> KVCache:
        raise torch.OutOfMemoryError("tried to allocate 5 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(HeartMuLa, "depth_cache", full)
        with pytest.raises(DeviceFull, match="5 GiB"):
            engine.admit("song", song)
    engine.admit("song", song)
    assert engine.step()["song"] is not None


def test_a_frame_that_did_not_fit_may_be_tried_again(
    engine: NativeEngine, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    song = Song(prompt=prompt, max_frames=3, topk=5, seed=3)
    whole = generate(engine, song)
    assert len(whole) == 3

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    engine.admit("song", song)
    for frame in whole:
        with monkeypatch.context() as patch:
            patch.setattr(HeartMuLa, "frame", full)
            with pytest.raises(DeviceFull):
                engine.step()
        assert engine.step()["song"].tolist() == frame  # type: ignore[union-attr]


# Sampling


def test_draws_follow_the_probabilities_of_the_top_k() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 1.0, 1.5]])
    generator = torch.Generator().manual_seed(1)
    sampler = Sampler(temperature=0.7, topk=3, cfg_scale=1)
    count = torch.zeros(5)
    draws = 4000
    for _ in range(draws):
        count[sampler.draw(logits, torch.empty(5).exponential_(1, generator=generator))] += 1
    # The third largest is there twice; only the 0 is out.
    p = torch.tensor([2.0, 1.0, -torch.inf, 1.0, 1.5]).div(0.7).softmax(0)
    assert count[2] == 0
    assert ((count / draws - p).abs() < 5 * (p * (1 - p) / draws).sqrt() + 1e-9).all()


def test_topk_beyond_the_vocabulary_drops_nothing() -> None:
    noise = torch.tensor([1e3, 1e3, 1e-3])
    assert Sampler(temperature=1, topk=50, cfg_scale=1).draw(torch.tensor([[1.0, 1.0, 0.0]]), noise).tolist() == [2]


def test_greedy_takes_the_guided_maximum() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.0, 0.0]])  # guided at 2: 1.0, 1.8, 0.0
    assert Sampler(temperature=0, topk=1, cfg_scale=2).draw(logits, None).tolist() == [1]
    assert Sampler(temperature=0, topk=1, cfg_scale=1).draw(logits[:1], None).tolist() == [0]


def test_frame_seed_is_splitmix64() -> None:
    """Values published with the algorithm, for seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [frame_seed(1234567, frame) for frame in range(4)] == published
    assert frame_seed(2**64 - 1, 5) < 2**64


# Reading checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder to change."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "ckpt"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    file = checkpoint.lm_path / "model.safetensors"
    stored = load_file(file)
    change(stored)
    save_file(stored, file)
    return checkpoint


def weights_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = HeartMuLa(checkpoint.lm, dtype)
    load_weights(model, checkpoint.lm_path)
    return dict(model.named_parameters())


def test_every_weight_is_the_files(checkpoint: Checkpoint) -> None:
    """Parameters that were forgotten would hold whatever was in memory: they are all accounted for by their sum."""
    stored = {k: v for k, v in tensors(checkpoint.lm_path) if k != "muq_linear.weight"}
    loaded = weights_of(checkpoint, torch.float64)
    assert sum(p.numel() for p in loaded.values()) == sum(t.numel() for t in stored.values())
    ours = torch.cat([p.flatten() for p in loaded.values()]).sort().values
    theirs = torch.cat([t.flatten() for t in stored.values()]).double().sort().values
    assert torch.equal(ours, theirs)


def test_shards_load_as_the_single_file(checkpoint: Checkpoint, folder: Path) -> None:
    lm = open_checkpoint(folder).lm_path
    stored = load_file(lm / "model.safetensors")
    index: dict[str, str] = {}
    for number in range(3):
        part = dict(list(stored.items())[number::3])
        save_file(part, lm / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (lm / "model.safetensors").rename(lm / "stray.safetensors")  # not in the index: must not be read
    (lm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    single, sharded = weights_of(checkpoint), weights_of(open_checkpoint(folder))
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_computed_buffers_in_a_file_are_passed_over(checkpoint: Checkpoint, folder: Path) -> None:
    buffers = {
        "backbone.layers.0.attn.pos_embeddings.theta": torch.full((8,), torch.nan),
        "backbone.layers.0.attn.pos_embeddings.cache": torch.full((4, 8, 2), torch.nan),
        "decoder.layers.0.attn.pos_embeddings.theta": torch.full((6,), torch.nan),
        "backbone_causal_mask": torch.ones(4, 4, dtype=torch.bool),
        "decoder_causal_mask": torch.ones(8, 8, dtype=torch.bool),
    }
    changed = rewrite(folder, lambda stored: stored.update(buffers))
    expected, loaded = weights_of(checkpoint), weights_of(changed)
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.layers.1.mlp.w2.weight"), r"decoder\.layers\.1\.mlp\.w2\.weight missing"),
        (lambda s: s.pop("muq_linear.weight"), r"muq_linear\.weight missing"),
        (lambda s: s.update({"backbone.layers.9.norm": torch.ones(2)}), r"unexpected tensor backbone\.layers\.9\.norm"),
        (
            lambda s: s.update(audio_head=s["audio_head"].transpose(1, 2).contiguous()),
            r"audio_head is \[7, 69, 48\] .* \[7, 48, 69\]",
        ),
        (
            lambda s: s.update({"backbone.norm.scale": torch.ones(1)}),  # would broadcast
            r"backbone\.norm\.scale is \[1\]",
        ),
        (
            lambda s: s.update({"muq_linear.bias": torch.ones(64, dtype=torch.int8)}),
            r"muq_linear\.bias is .*int8",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(
    change: Callable[[dict[str, Tensor]], object], message: str, folder: Path
) -> None:
    engine = NativeEngine(rewrite(folder, change), "cpu", "float32")
    with pytest.raises(ConfigError, match=message):
        engine.load()
    with pytest.raises(PhaseError):
        engine.to_device()


def test_loading_keeps_no_tensor_of_the_file(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is read, those before it are gone: beside the model, the host holds one at a time."""
    read: list[weakref.ref[Tensor]] = []

    def watched(folder: Path) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors(folder):
            assert not any(ref() is not None for ref in read), name
            copy = tensor.clone()
            del tensor
            read.append(weakref.ref(copy))
            yield name, copy
            del copy

    monkeypatch.setattr(weights, "tensors", watched)
    weights_of(checkpoint, torch.bfloat16)  # the file's own dtype, where keeping its tensors would be easy
    assert len(read) > 10
    assert not any(ref() is not None for ref in read)


def test_weight_bytes_are_known_before_loading(checkpoint: Checkpoint) -> None:
    engine = NativeEngine(checkpoint, "cpu", "bfloat16")
    before = engine.weight_bytes
    loaded = ready(checkpoint, "bfloat16")
    held = [*loaded._ready().parameters(), *loaded._ready().buffers()]
    moved = sum(t.nbytes for t in held) - checkpoint.lm.text_vocab_size * checkpoint.lm.backbone.embed_dim * 2
    assert moved <= before < moved + 256 * len(held)
