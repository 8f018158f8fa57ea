"""The documentation of problem types."""

import re
from pathlib import Path

import services.gateway
from services.gateway.errors import STATUSES, TITLES

_DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_problem_is_documented_and_nothing_else() -> None:
    assert re.findall(r"^### `([a-z-]+)`$", _DOCUMENT.read_text(), re.MULTILINE) == list(TITLES)
    assert STATUSES.keys() == TITLES.keys()


def test_every_problem_that_is_sent_has_a_title() -> None:
    folder = Path(services.gateway.__file__).parent
    text = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    sent = set(re.findall(r'(?:ApiError\(\s*\d+,\s*|\d+: |get\(status, )"([a-z-]+)"', text))
    assert sent == set(TITLES)
