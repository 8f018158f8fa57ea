"""The adapter to the reference's codec. Every test but the first needs heartlib: `make test-reference` brings it."""

import sys

import numpy as np
import pytest

from services.codec_worker.engines.heartlib import HeartlibCodec
from shared.errors import ConfigError
from shared.model.checkpoint import Checkpoint


def test_a_missing_heartlib_is_reported(golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("heartlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "heartlib", None)
    with pytest.raises(ConfigError, match="HEARTMULA_ENGINE=heartlib needs heartlib"):
        HeartlibCodec(golden_checkpoint, "cpu", "float32")


def test_it_decodes_a_song(golden_checkpoint: Checkpoint) -> None:
    pytest.importorskip("heartlib")
    engine = HeartlibCodec(golden_checkpoint, "cpu", "float32")
    engine.load()
    engine.to_device()
    codes = np.random.default_rng(0).integers(0, golden_checkpoint.codec.codebook_size, (8, 100), dtype=np.int16)
    (step,) = engine.decode(codes, seed=1)
    assert step.audio is not None
    assert step.audio.shape == (100 * engine.sample_rate * 2 // 25, 2)
    assert np.isfinite(step.audio).all()
    (again,) = engine.decode(codes, seed=1)
    assert again.audio is not None
    assert np.array_equal(step.audio, again.audio)
