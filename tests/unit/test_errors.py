"""The tree of errors in the docstring of `shared.errors` is the tree of the classes."""

import inspect
import re

from shared import errors

LINE = re.compile(r"(?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: {2,}\S.*)?")


def documented() -> dict[str, str]:
    """Each error's parent, by the docstring."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        if found := LINE.fullmatch(line.removeprefix("    ")):
            depth = len(found["indent"]) // 4
            path[depth:] = [found["name"]]
            parents[found["name"]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_docstring_shows_every_error_and_its_parent() -> None:
    classes = {
        name: kind.__base__.__name__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__ and kind.__base__ is not None
    }
    assert documented() == classes
    assert len(classes) > 20
