"""Problem types: each is documented, and each is sent."""

import re
from pathlib import Path

import services.gateway
from services.gateway.errors import PROBLEMS, REFUSALS

_DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_problem_is_documented_with_its_status_and_nothing_else() -> None:
    _, table = _DOCUMENT.read_text().split("| `/problems/…` |")
    rows = re.findall(r"^\| `([a-z-]+)` \| ([^|]+) \|", table.partition("\n\n")[0], re.MULTILINE)
    statuses = {kind: str(found.status) for kind, found in PROBLEMS.items()} | {"refused": "other 4xx"}
    assert dict(rows) == statuses


def test_every_problem_that_is_sent_has_a_title() -> None:
    folder = Path(services.gateway.__file__).parent
    text = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    sent = set(re.findall(r'(?:ApiError\(\s*\d+,\s*|\d+: |get\(status, )"([a-z-]+)"', text))
    assert sent | set(REFUSALS.values()) == set(PROBLEMS)
