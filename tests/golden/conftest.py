"""The golden data: vectors recorded from the reference, and the small checkpoint they were recorded on."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from shared.model.checkpoint import Checkpoint, open_checkpoint


def golden_folder() -> Path:
    """Folder named by `HEARTMULA_GOLDEN`, or the one beside this file. Its README.md describes the contents."""
    return Path(os.environ.get("HEARTMULA_GOLDEN") or Path(__file__).parent / "data")


def guidance_scales(cases: Iterable[str]) -> list[str]:
    """Guidance scales of a recorded set, from the names of its cases: ``greedy.cfg1.5.fp32``."""
    named = [re.fullmatch(r"\w+\.cfg(.+)\.\w+", case) for case in cases]
    return sorted({found[1] for found in named if found}, key=float)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `cfg` runs at every guidance scale of the set."""
    if "cfg" in metafunc.fixturenames:
        facts = json.loads((golden_folder() / "lm.json").read_text())
        scales = guidance_scales(facts["cases"])
        assert scales, "the set's lm.json names no case such as greedy.cfg1.5.fp32"
        metafunc.parametrize("cfg", scales)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden data."""
    return golden_folder()


@pytest.fixture(scope="session")
def golden_checkpoint(golden: Path) -> Checkpoint:
    return open_checkpoint(golden / "ckpt")
