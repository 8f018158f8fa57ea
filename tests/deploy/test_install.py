"""Decisions of the installation, with stand-ins for pip and uv that record their calls and install nothing."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
PROJECTS = ("./client[cli]", ".[worker]")
EDITABLE = "--editable ./client[cli] --editable .[worker]"
STAND_IN = """#!/bin/sh
cd "$CHECKOUT"
call="$(basename "$0") $*"
echo "${UV_HTTP_RETRIES:+with $UV_HTTP_RETRIES retries: }$call" >> calls
case "$call" in *"-c import"*) ;; *) env | grep -E '^(UV|SSL)_' | sort > variables ;; esac
case "$call" in *"config list") cat settings ;; esac
echo "$call" | grep -qE -e "$HANGING" && exec sleep 60
echo "$call" | grep -qE -e "$FAILING" && { printf 'error: no\\n  cause: the index is away\\n' >&2; exit 1; }
exit 0
"""
UV = "uv pip install --quiet --python PYTHON"
PIP = "python -m pip install --quiet"
FETCH_UV = f"{PIP} --constraint constraints.txt --only-binary uv uv"
READ_SETTINGS = "python -m pip config list"
PROBE = f"with 0 retries: {UV} --dry-run --no-deps --torch-backend auto {TORCH}"
INSTALL = f"{UV} --constraint constraints.txt {TORCH} {EDITABLE}"
INSTALL_FOR_DEVICE = f"{UV} --constraint constraints.txt --torch-backend auto {TORCH} {EDITABLE}"
CHECK = "python -I -c import soundfile"
PIP_INSTALLS = [f"{PIP} {TORCH}", f"{PIP} --constraint constraints.txt {EDITABLE}"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose path has a space and an accent, and an environment of stand-ins that succeed."""
    checkout = tmp_path / "une forêt"
    (checkout / "deploy").mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "install.py", checkout / "deploy")
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for program in (".venv/bin/python", ".venv/bin/uv", "base-python"):
        (checkout / program).write_text(STAND_IN)
        (checkout / program).chmod(0o755)
    (checkout / "settings").touch()
    for name in [name for name in os.environ if name.startswith(("UV_", "SSL_"))]:
        monkeypatch.delenv(name)
    for name, value in {"CHECKOUT": str(checkout), "FAILING": "^$", "HANGING": "^$"}.items():
        monkeypatch.setenv(name, value)
    return checkout


@pytest.fixture
def script(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", checkout / "deploy" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def calls(checkout: Path, script: ModuleType) -> Callable[[], list[str]]:
    """Run the installation; returns the calls of pip and uv, but for those that check what uv installed."""

    def run(status: int = 0) -> list[str]:
        assert script.main(TORCH, *PROJECTS) == status
        lines = (checkout / "calls").read_text().replace(script.PYTHON, "PYTHON").splitlines()
        return [line for line in lines if line != CHECK]

    return run


def variables(checkout: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (checkout / "variables").read_text().splitlines())


def test_a_wheel_on_the_disk_is_used_and_no_index_is_asked_for_torch(
    checkout: Path, calls: Callable[[], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = checkout / "wheels"
    folder.mkdir()
    (checkout / "settings").write_text(f":env:.find-links='/missing {folder.as_uri()}'\n")
    from_disk = f"{UV} --no-deps --no-index --find-links {folder} {TORCH}"
    assert calls() == [FETCH_UV, READ_SETTINGS, from_disk, INSTALL]
    assert variables(checkout)["UV_FIND_LINKS"] == str(folder)
    assert capfd.readouterr().err == ""


def test_where_no_wheel_on_the_disk_fits_torch_comes_for_the_device_at_hand(
    checkout: Path, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "wheels").mkdir()
    (checkout / "settings").write_text("global.find-links='~/wheels'\n")
    monkeypatch.setenv("HOME", str(checkout))
    monkeypatch.setenv("FAILING", "--no-index")
    assert calls()[3:] == [PROBE, INSTALL_FOR_DEVICE]


def test_without_find_links_torch_comes_for_the_device_at_hand(calls: Callable[[], list[str]]) -> None:
    assert calls() == [FETCH_UV, READ_SETTINGS, PROBE, INSTALL_FOR_DEVICE]


def test_without_pytorchs_index_the_package_index_is_used_and_one_line_says_so(
    calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILING", "torch-backend")
    assert calls()[2:] == [PROBE, INSTALL]
    (line,) = capfd.readouterr().err.splitlines()
    assert "(cause: the index is away): taking the build that the package index has" in line


def test_an_index_that_does_not_answer_delays_nothing(
    script: ModuleType,
    calls: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HANGING", "torch-backend")
    monkeypatch.setattr(script, "PROBE_SECONDS", 0.3)
    assert calls()[2:] == [PROBE, INSTALL]
    (line,) = capfd.readouterr().err.splitlines()
    assert "no answer" in line


def test_torch_that_is_installed_stays(checkout: Path, calls: Callable[[], list[str]]) -> None:
    (checkout / ".venv/lib/python3.11/site-packages/torch-2.13.0+cpu.dist-info").mkdir(parents=True)
    assert calls() == [FETCH_UV, READ_SETTINGS, INSTALL]


def test_without_uv_pip_installs_torch_first(
    calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILING", "uv uv$")
    assert calls() == [FETCH_UV, *PIP_INSTALLS]
    assert "uv cannot be had" in capfd.readouterr().err


def test_where_uv_fails_pip_tries_and_its_failure_is_the_installations(
    calls: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING", "^uv")
    assert calls(0)[3:] == [INSTALL, *PIP_INSTALLS]
    monkeypatch.setenv("FAILING", "^uv|--editable")
    assert calls(1)[-2:] == PIP_INSTALLS


def test_a_soundfile_without_its_library_is_replaced_by_pips_choice(
    checkout: Path, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calls()[-1] == INSTALL_FOR_DEVICE
    monkeypatch.setenv("FAILING", CHECK)
    again = f"{PIP} --constraint constraints.txt --force-reinstall --no-deps soundfile"
    assert calls()[-2:] == [INSTALL_FOR_DEVICE, again]


def test_uv_follows_pips_settings_and_its_own_come_first(
    checkout: Path, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "global.index-url": "https://all.test/simple",
        "install.index-url": "https://install.test/simple",
        "global.extra-index-url": "https://one.test/simple\nhttps://two.test/simple",
        "global.find-links": "https://links.test/wheels",
        "global.constraint": "/etc/a.txt /etc/b.txt",
        "global.cert": "/etc/global.pem",
        ":env:.cert": "/etc/it's.pem",
        ":env:.default-timeout": "180",
        "freeze.timeout": "1",
    }
    (checkout / "settings").write_text("".join(f"{key}={value!r}\n" for key, value in settings.items()))
    monkeypatch.setenv("UV_HTTP_TIMEOUT", "7")
    assert calls()[-1] == INSTALL_FOR_DEVICE.replace(
        "constraints.txt", "constraints.txt --constraint /etc/a.txt --constraint /etc/b.txt"
    )
    assert variables(checkout) == {
        "SSL_CERT_FILE": "/etc/it's.pem",
        "UV_DEFAULT_INDEX": "https://install.test/simple",
        "UV_FIND_LINKS": "https://links.test/wheels",
        "UV_HTTP_TIMEOUT": "7",
        "UV_INDEX": "https://one.test/simple https://two.test/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_a_python_without_ensurepip_gets_pip_from_the_systems(
    checkout: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(checkout / ".venv")
    monkeypatch.setattr(sys, "executable", str(checkout / "base-python"))
    monkeypatch.setattr(script, "find_spec", lambda _name: None)
    script.make_environment()
    assert (checkout / "calls").read_text().splitlines() == [
        f"base-python -m venv --clear --without-pip {checkout}/.venv",
        f"base-python -m pip --python {checkout}/.venv/bin/python install --quiet pip",
    ]
    monkeypatch.setenv("FAILING", "--python")
    assert script.main(TORCH, *PROJECTS) == 1
    assert "cannot install pip: give it pip or ensurepip" in capfd.readouterr().err
    assert script.INCOMPLETE.exists()


def test_a_sound_environment_is_kept_and_a_broken_one_is_created_again(checkout: Path) -> None:
    def steps() -> str:
        return subprocess.run(
            ["make", "-n", "install"], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout

    (checkout / "services" / "client").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "services/client/pyproject.toml"):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "shared").symlink_to(ROOT / "shared")
    python, stamp = checkout / ".venv" / "bin" / "python", checkout / ".venv" / ".installed"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    stamp.touch()
    assert "deploy/install.py" not in steps()

    os.utime(checkout / "constraints.txt", (stamp.stat().st_mtime + 1,) * 2)
    assert "deploy/install.py" in steps()
    assert "rm -rf .venv" not in steps()
    stamp.unlink()  # an environment of somebody's own
    assert "deploy/install.py" in steps()
    assert "rm -rf .venv" not in steps()
    (checkout / ".venv" / ".incomplete").touch()  # interrupted: the first installation removes it last
    assert "rm -rf .venv" in steps()
    (checkout / ".venv" / ".incomplete").unlink()
    stamp.touch()
    (checkout / "shared").unlink()  # moved: what the environment imports lies elsewhere
    (checkout / "shared").mkdir()
    assert "rm -rf .venv" in steps()
    python.unlink()
    assert "rm -rf .venv" in steps()
