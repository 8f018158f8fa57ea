"""Tests of what only a card shows. Where their body does not need one, they run on the CPU too, as in `make test`.

``pytest -m gpu`` runs them on the first CUDA device; where there is none, those are skipped. Nothing outside this
folder is needed but the engines: see `tests.gpu.__main__`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.model.checkpoint import Checkpoint, open_checkpoint
from tests.golden.conftest import golden_folder, guidance_scales
from tests.unit.native_engines import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]
DEMO = open_checkpoint(ROOT / "ckpt/demo")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `device` runs on the CPU and, as a GPU test, on CUDA; `cfg` is a guidance scale."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
    if "cfg" in metafunc.fixturenames:
        facts = json.loads((golden_folder() / "lm.json").read_text())
        metafunc.parametrize("cfg", guidance_scales(facts["cases"]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """CUDA is only asked for once such a test begins: collecting tests opens no context."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device here")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden data."""
    return golden_folder()


@pytest.fixture(scope="session")
def golden_checkpoint(golden: Path) -> Checkpoint:
    return open_checkpoint(golden / "ckpt")


@pytest.fixture
def say(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Print a measured fact as a JSON line, past pytest's capture."""

    def line(**facts: Any) -> None:
        with capsys.disabled():
            print("\n" + json.dumps({"test": request.node.name, **facts}), flush=True)

    return line
