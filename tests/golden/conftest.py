"""The golden data: vectors recorded from the reference, and the small checkpoint they were recorded on."""

import os
from pathlib import Path

import pytest

from shared.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden data: `HEARTMULA_GOLDEN`, or the set beside this file. Its README.md says what is in it."""
    return Path(os.environ.get("HEARTMULA_GOLDEN") or Path(__file__).parent / "data")


@pytest.fixture(scope="session")
def golden_checkpoint(golden: Path) -> Checkpoint:
    return open_checkpoint(golden / "ckpt")
