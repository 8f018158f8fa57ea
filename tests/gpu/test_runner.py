"""`make gpu` before it begins: what is missing is named, and the engines' part needs nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import __main__ as runner

# Names what it refuses to import, then imports what `make gpu` runs without worker processes.
ALONE = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ImportError("refused: " + name)

sys.meta_path.insert(0, Refuse())
for name in {modules!r}:
    importlib.import_module(name)
assert "torch" in sys.modules
import torch
assert not torch.cuda.is_initialized()
"""


def test_engines_tests_and_bench_need_no_package_of_the_workers() -> None:
    refused = {*runner.SYSTEM, "litestar", "uvicorn", "stamina", "click", "rich", "httpx"} - {"pynvml"}  # torch asks
    modules = ["tests.gpu.conftest", "tests.bench.gpu"]
    modules += ["tests.gpu." + name.removesuffix(".py") for name in runner.FILES if name != "test_processes.py"]
    program = ALONE.format(refused=refused, modules=modules)
    run = subprocess.run([sys.executable, "-c", program], cwd=runner.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_what_is_missing_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "ENGINES", {"torch": "torch>=2.8", "no_such_module": "not-there"})
    monkeypatch.setattr(runner, "BINARIES", {"no-such-server": "no-server-bin"})
    assert runner.main(["--seconds", "10"]) == 2
    said = capsys.readouterr().err
    assert "nothing can run without not-there" in said
    assert "left out without no-server-bin" in said
    assert "-m pip install not-there no-server-bin" in said


def test_a_folder_without_wheels_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no wheels"):
        runner.main(["--wheels", str(tmp_path)])


def test_parts_find_this_projects_tests_whatever_is_installed(tmp_path: Path) -> None:
    """Another package may have put a folder `tests` beside its own."""
    (tmp_path / "other" / "tests").mkdir(parents=True)
    (tmp_path / "other" / "tests" / "__init__.py").write_text("raise ImportError('the wrong one')")
    env = runner.environment(tmp_path / "site")
    env["PYTHONPATH"] += f":{tmp_path / 'other'}"
    program = "import tests.gpu; print(list(tests.gpu.__path__)[0])"
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.stdout.strip() == str(runner.ROOT / "tests" / "gpu"), run.stderr


def test_a_part_that_takes_too_long_is_interrupted_and_can_say_what_it_has(
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far')"
    assert runner.run([sys.executable, "-u", "-c", program], {}, 1.0) == 1
    assert "so far" in capfd.readouterr().out
