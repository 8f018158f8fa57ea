"""The check for what Triton needs, before the first kernel is compiled."""

import importlib.util
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.tokenizer_worker.model.kernels.compiler import missing_compiler

Install = Callable[[str, int], Path]


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    missing_compiler.cache_clear()
    yield
    missing_compiler.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Empty PATH, headers without Python.h and a Triton; returns a function that installs a fake compiler."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda _scheme: {"include": str(tmp_path)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())

    def fake(name: str, status: int) -> Path:
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\necho "$0: error: stdlib.h: No such file" >&2\nexit {status}\n')
        script.chmod(0o755)
        return script

    return fake


def test_nothing_is_missing_with_either_compiler_and_the_headers(install: Install, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    install("clang", 0)
    assert missing_compiler() is None
    missing_compiler.cache_clear()
    install("gcc", 1)  # taken before clang, as Triton does
    assert "libc6-dev" in str(missing_compiler())


def test_without_triton(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert "Triton is not installed" in str(missing_compiler())


def test_without_a_compiler(install: Install) -> None:
    assert "install gcc" in str(missing_compiler())


def test_without_pythons_headers(install: Install, tmp_path: Path) -> None:
    install("gcc", 0)
    assert f"Python.h is not in {tmp_path}" in str(missing_compiler())


def test_without_the_headers_of_the_c_library(install: Install, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    install("gcc", 1)
    assert "stdlib.h" in str(missing_compiler())
    assert "install libc6-dev" in str(missing_compiler())


@pytest.mark.parametrize("name", ["gone", ""])
def test_a_compiler_that_is_named_but_not_there(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Triton takes CC as it is, so the compilers on the PATH do not count."""
    (tmp_path / "Python.h").touch()
    install("gcc", 0)
    monkeypatch.setenv("CC", name)
    assert "cannot be run" in str(missing_compiler())


def test_a_compiler_that_is_named_is_asked(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Python.h").touch()
    install("gcc", 1)
    monkeypatch.setenv("CC", str(install("cc-of-mine", 0)))
    assert missing_compiler() is None


def test_the_answer_is_kept(install: Install, tmp_path: Path) -> None:
    found: list[Any] = [missing_compiler()]
    (tmp_path / "Python.h").touch()
    install("gcc", 0)
    found.append(missing_compiler())
    assert found[0] == found[1]
