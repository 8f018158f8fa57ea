"""Random checkpoints are of the official layout, and keep activations near 1."""

from pathlib import Path

import numpy as np
import pytest
import torch

from services.codec_worker.engines.encoder import NativeEncoder
from services.tokenizer_worker.engines.native import NativeEngine
from shared.model.checkpoint import Flavor, open_checkpoint, tensors
from tests.bench import checkpoints

SMALL = Flavor(num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64, intermediate_dim=96, max_seq_len=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_weights_are_loaded_as_they_were_written(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 1 << 20)  # so that there are several
    checkpoint = checkpoints.lm(tmp_path, (SMALL, SMALL), dtype)
    assert len(list(checkpoint.lm_path.glob("*.safetensors"))) > 2
    engine = NativeEngine(checkpoint, "cpu", "float32")
    engine.load()  # every tensor is there, in its shape
    found = dict(tensors(checkpoint.lm_path))
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        if name.endswith("scale"):
            assert (tensor == 1).all(), name
        elif tensor.ndim > 1:
            inputs = tensor.shape[1] if name == "audio_head" else tensor.shape[1:].numel()
            expected = 1 if "embed" in name else inputs**-0.5
            assert float(tensor.float().std()) == pytest.approx(expected, rel=0.3), name
    first, second = (found[f"backbone.layers.{layer}.mlp.w1.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_a_random_encoder_is_loaded_and_encodes(tmp_path: Path) -> None:
    small = open_checkpoint(checkpoints.GOLDEN_ENCODER)
    assert small.encoder is not None
    engine = NativeEncoder(checkpoints.encoder(tmp_path, small.encoder, small.codec), "cpu")
    engine.load()  # every tensor is there, in its shape
    engine.to_device()
    audio = 0.1 * np.random.default_rng(0).standard_normal((1, 24_000), np.float32)
    (codes,) = (step.codes for step in engine.encode(audio, 24_000) if step.codes is not None)
    assert codes.shape == (8, 13)
    assert codes.max() < small.codec.codebook_size
