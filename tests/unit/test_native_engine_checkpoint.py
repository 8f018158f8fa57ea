"""Reading checkpoints of the language model."""

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import HeartMuLa, load_weights
from services.tokenizer_worker.model import loading as weights
from shared.errors import ConfigError, PhaseError
from shared.model.checkpoint import Checkpoint, Part, open_checkpoint, parts, tensors
from tests.unit.native_engines import TINY, one_thread, ready  # noqa: F401


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder to change."""
    return Path(shutil.copytree(TINY.path, tmp_path / "ckpt"))


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


def test_every_weight_is_the_files() -> None:
    """A forgotten parameter would hold arbitrary memory, so all values are compared, sorted."""
    stored = {k: v for k, v in tensors(TINY.lm_path) if k != "muq_linear.weight"}
    loaded = weights_of(TINY, torch.float64)
    assert sum(p.numel() for p in loaded.values()) == sum(t.numel() for t in stored.values())
    ours = torch.cat([p.flatten() for p in loaded.values()]).sort().values
    theirs = torch.cat([t.flatten() for t in stored.values()]).double().sort().values
    assert torch.equal(ours, theirs)


def test_shards_load_as_the_single_file(folder: Path) -> None:
    lm = open_checkpoint(folder).lm_path
    stored = load_file(lm / "model.safetensors")
    index: dict[str, str] = {}
    for number in range(3):
        part = dict(list(stored.items())[number::3])
        save_file(part, lm / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (lm / "model.safetensors").rename(lm / "stray.safetensors")  # not in the index: must not be read
    (lm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    single, sharded = weights_of(TINY), weights_of(open_checkpoint(folder))
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_computed_buffers_in_a_file_are_passed_over(folder: Path) -> None:
    buffers = {
        "backbone.layers.0.attn.pos_embeddings.theta": torch.full((8,), torch.nan),
        "backbone.layers.0.attn.pos_embeddings.cache": torch.full((4, 8, 2), torch.nan),
        "decoder.layers.0.attn.pos_embeddings.theta": torch.full((6,), torch.nan),
        "backbone_causal_mask": torch.ones(4, 4, dtype=torch.bool),
        "decoder_causal_mask": torch.ones(8, 8, dtype=torch.bool),
    }
    changed = rewrite(folder, lambda stored: stored.update(buffers))
    expected, loaded = weights_of(TINY), weights_of(changed)
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


def test_loading_keeps_no_tensor_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the file are read one at a time, and each is gone when the next is read."""
    read: list[weakref.ref[Tensor]] = []
    expected = weights_of(TINY, torch.bfloat16)

    def watched(folder: Path) -> Iterator[Part]:
        for part in parts(folder, nbytes=1000):
            assert not any(ref() is not None for ref in read), part.name
            copy = Part(part.name, part.shape, part.start, part.rows.clone())
            del part
            read.append(weakref.ref(copy.rows))
            yield copy
            del copy

    monkeypatch.setattr(weights, "parts", watched)
    loaded = weights_of(TINY, torch.bfloat16)  # the file's own dtype, where keeping its tensors would be easy
    assert len(read) > 100
    assert not any(ref() is not None for ref in read)
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_weight_bytes_are_known_before_loading() -> None:
    engine = NativeEngine(TINY, "cpu", "bfloat16")
    before = engine.weight_bytes
    loaded = ready(TINY, "bfloat16")
    held = [*loaded._ready().parameters(), *loaded._ready().buffers()]
    moved = sum(t.nbytes for t in held) - TINY.lm.text_vocab_size * TINY.lm.backbone.embed_dim * 2
    assert moved <= before < moved + 256 * len(held)
