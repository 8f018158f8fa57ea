"""Compares JSON documents and names every path at which they differ."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

_PROSE = {"description", "summary", "title", "detail"}
_HOW = "others rely on it; where it is meant, tests/compatibility/write.py says what to do"
_SHOWN = 120  # characters of a value in a message


def without_prose(value: Any) -> Any:
    """Remove descriptive texts from an OpenAPI or AsyncAPI document; of examples only their names stay.

    A property that is called `title` is no text: its value is a schema.
    """
    if isinstance(value, list):
        return [without_prose(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, item in value.items():
        if name in ("example", "examples"):
            if isinstance(item, dict) and name == "examples":
                kept[name] = sorted(item)
        elif not (name in _PROSE and isinstance(item, str)):
            kept[name] = without_prose(item)
    return kept


def require_same(old: Any, new: Any, what: str) -> None:
    """Fail a test with every path at which two documents differ."""
    if found := sorted(differences(old, new)):
        pytest.fail("\n".join([f"{what} has changed: {_HOW}", *found]), pytrace=False)


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield one sentence for each place at which `new` is not what `old` is, whatever the order of members."""
    where = path or "the whole document"
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() | new.keys():
            inner = f"{path}[{json.dumps(name)}]"
            if name not in new:
                yield f"{inner} is gone; it was {_short(old[name])}"
            elif name not in old:
                yield f"{inner} is new: {_short(new[name])}"
            else:
                yield from differences(old[name], new[name], inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif isinstance(old, bool) is not isinstance(new, bool) or old != new:
        yield f"{where} was {_short(old)} and is now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def plain(value: Any) -> Any:
    """The value as JSON holds it: enumerations are their values, tuples are lists."""
    return json.loads(json.dumps(value))


def compact(value: Any, depth: int = 2) -> str:
    """JSON with a line for each member down to `depth`, so that files stay small and a difference is one line."""
    if depth == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    lines = ",\n".join(f"{json.dumps(name)}: {compact(item, depth - 1)}" for name, item in value.items())
    return f"{{\n{lines}\n}}"
