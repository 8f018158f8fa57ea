"""Problem types: each is documented, and each is sent."""

import re
from pathlib import Path

import services.gateway
from services.gateway.errors import PROBLEMS

_DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_problem_is_documented_and_nothing_else() -> None:
    assert re.findall(r"^### `([a-z-]+)`$", _DOCUMENT.read_text(), re.MULTILINE) == list(PROBLEMS)


def test_every_problem_that_is_sent_has_a_title() -> None:
    folder = Path(services.gateway.__file__).parent
    text = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    sent = set(re.findall(r'(?:ApiError\(\s*\d+,\s*|\d+: |get\(status, )"([a-z-]+)"', text))
    assert sent == set(PROBLEMS)
