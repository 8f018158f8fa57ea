"""Write anew what `tests/compatibility` holds the code against: ``python -m tests.compatibility.write``.

The files in `data` are promises to users, to other versions that run at the same time, and to what older versions have
stored. A failing test says that a promise was broken: mend the code then. Run this only when a promise changes
deliberately: a route, field, setting, option or figure is added, or an upgrade of a library words a document in another
way without changing what it means. Name the change in the commit, and look at `git diff tests/compatibility/data`:
every line in it must be meant.

What is stored is never overwritten, for it stays readable: only examples that are new are added. Where a structure
gains a field, give the old bytes in `data/stored.json` another name and an example that is read and not written.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.compatibility.compare import compact
from tests.compatibility.documents import DOCUMENTS, document
from tests.compatibility.stored import STORED, TOKEN_FILES, derived

DATA = Path(__file__).parent / "data"


async def main() -> None:
    """Write every file."""
    for name in DOCUMENTS:
        _write(name, await document(name))
    _write("derived", derived())
    known = DATA / "stored.json"
    kept = json.loads(known.read_bytes()) if known.exists() else {}
    _write("stored", {name: kept.get(name) or item.write(item.value).decode() for name, item in STORED.items()})
    for name, item in TOKEN_FILES.items():
        if not (DATA / name).exists():
            (DATA / name).write_bytes(item.write(item.value))


def _write(name: str, value: Any) -> None:
    (DATA / f"{name}.json").write_text(compact(value) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
