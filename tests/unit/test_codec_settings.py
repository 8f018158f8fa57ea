"""The configuration sets the codec's number of steps and its guidance."""

from pathlib import Path

import numpy as np
import pytest

from services.codec_worker.__main__ import build_engine
from shared.errors import ConfigError
from shared.model.checkpoint import open_checkpoint
from shared.settings import Settings

TINY = Path(__file__).parents[1] / "golden" / "data" / "ckpt"
CODES = np.random.default_rng(0).integers(0, 64, (8, 20), dtype=np.int16)


def decoded(**environment: str) -> tuple[int, np.ndarray]:
    """Decode a short song; returns its steps and its audio."""
    settings = Settings.load({"HEARTMULA_DEVICE": "cpu", "HEARTMULA_MODEL_DTYPE": "float32", **environment})
    engine, _, _ = build_engine(settings, open_checkpoint(TINY))
    engine.load()
    engine.to_device()
    steps = list(engine.decode(CODES, seed=1))
    return steps[-1].total, np.concatenate([step.audio for step in steps if step.audio is not None])


def test_steps_and_guidance_reach_the_engine() -> None:
    total, usual = decoded()
    assert total == 11
    total, same = decoded(HEARTMULA_CODEC_STEPS="10", HEARTMULA_CODEC_GUIDANCE="1.25")
    assert total == 11
    assert np.array_equal(same, usual)
    total, quick = decoded(HEARTMULA_CODEC_STEPS="4")
    assert total == 5
    total, plain = decoded(HEARTMULA_CODEC_GUIDANCE="1")
    assert total == 11
    for other in (quick, plain):
        assert other.shape == usual.shape
        assert np.isfinite(other).all()
        assert not np.array_equal(other, usual)


@pytest.mark.parametrize(
    ("variable", "value", "hint"),
    [
        ("HEARTMULA_CODEC_STEPS", "0", "from 1 to 100"),
        ("HEARTMULA_CODEC_STEPS", "101", "from 1 to 100"),
        ("HEARTMULA_CODEC_STEPS", "2.5", "whole number"),
        ("HEARTMULA_CODEC_GUIDANCE", "0.9", "a number from 1 to 5"),
        ("HEARTMULA_CODEC_GUIDANCE", "nan", "a number from 1 to 5"),
        ("HEARTMULA_CODEC_GUIDANCE", "much", "a number from 1 to 5"),
    ],
)
def test_what_is_out_of_bounds_is_refused(variable: str, value: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable} must be {hint}|{variable} must be a {hint}"):
        Settings.load({variable: value})
