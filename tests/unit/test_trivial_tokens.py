"""The trivial token engine takes as long as it was told: for its frames, and for moving to the device and back."""

import time

import pytest

from services.tokenizer_worker.__main__ import build_engine
from shared.model.checkpoint import open_checkpoint
from shared.settings import Settings


def test_a_move_takes_what_the_setting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    settings = Settings(engine="trivial", trivial_step_ms=20, trivial_swap_ms=1500)
    engine, _, _ = build_engine(settings, open_checkpoint(settings.model_path, settings.model_version))
    engine.to_device()
    engine.step()
    engine.to_host()
    assert slept == [1.5, 0.02, 1.5]
