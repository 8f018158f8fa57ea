"""Install this checkout into ``.venv``; make calls it: ``python deploy/install.py torch==VERSION '.[EXTRA,…]' …``.

uv installs, in parallel; pip fetches uv, and installs where uv cannot be had or fails. Both follow pip's settings.
torch comes in several builds, for processors and for versions of CUDA. The first of these that is there is taken:

1. a wheel in a folder that pip's setting ``find-links`` names;
2. the build for this machine's card, or for its processor, from PyTorch's own index (uv looks for the card);
3. the build that the package index has.

Only the standard library is imported: this runs before anything is installed.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

ROOT = Path(__file__).absolute().parents[1]
VENV = ROOT / ".venv"
INCOMPLETE = VENV / ".incomplete"  # there until everything is in a new environment; make then makes it anew
PYTHON = str(VENV / "bin" / "python")
PIP_INSTALL = [PYTHON, "-m", "pip", "install", "--quiet"]
UV_INSTALL = [str(VENV / "bin" / "uv"), "pip", "install", "--quiet", "--python", PYTHON]
CONSTRAINTS = ["--constraint", "constraints.txt"]
PROBE_SECONDS = 20.0  # for PyTorch's index to answer

# uv's variables for what pip's settings say of where packages come from (find-links and constraint: see below).
UV_VARIABLES = {
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "extra-index-url": "UV_INDEX",
    "index-url": "UV_DEFAULT_INDEX",
    "no-index": "UV_NO_INDEX",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "trusted-host": "UV_INSECURE_HOST",
}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make_environment() -> None:
    """Make ``.venv`` with pip in it, where there is none. Raises CalledProcessError."""
    if os.path.exists(PYTHON):
        return
    with_pip = find_spec("ensurepip") is not None
    create = [sys.executable, "-m", "venv", "--clear", *([] if with_pip else ["--without-pip"]), str(VENV)]
    subprocess.run(create, cwd=ROOT, check=True)
    VENV.mkdir(exist_ok=True)
    INCOMPLETE.touch()
    if with_pip:
        return
    # As some distributions ship Python: the system's pip puts one into the environment.
    try:
        subprocess.run([sys.executable, "-m", "pip", "--python", PYTHON, "install", "--quiet", "pip"], check=True)
    except subprocess.CalledProcessError:
        say(f"{sys.executable} cannot install pip: give it pip or ensurepip (python3-venv in Debian and Ubuntu)")
        raise


def pip_settings() -> dict[str, str]:
    """Give pip's settings for ``pip install``, from its files and from the environment.

    Raises CalledProcessError.
    """
    listed = subprocess.run(
        [PYTHON, "-m", "pip", "config", "list"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}  # the last one wins
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section in sections:
            sections[section][key] = ast.literal_eval(value)
    return {key: value for section in sections.values() for key, value in section.items()}


def find_links(settings: dict[str, str]) -> tuple[list[str], list[str]]:
    """Give the folders of pip's ``find-links`` that exist (a missing one is an error for uv), and its addresses."""
    folders, addresses = [], []
    for link in settings.get("find-links", "").split():
        url = urlsplit(link)
        if url.scheme in ("", "file"):
            folder = ROOT / Path(url2pathname(url.path) if url.scheme else link).expanduser()
            folders += [str(folder)] if folder.is_dir() else []
        else:
            addresses.append(link)
    return folders, addresses


def uv_environment(settings: dict[str, str]) -> dict[str, str]:
    """Give the variables that make uv follow pip's settings; uv's own, where the user has set them, come first."""
    translated = {UV_VARIABLES[key]: " ".join(value.split()) for key, value in settings.items() if key in UV_VARIABLES}
    folders, addresses = find_links(settings)
    if folders or addresses:
        translated["UV_FIND_LINKS"] = ",".join(folders + addresses)
    # The newest version that any index has, as pip does it: uv stops at the first index that has any.
    return {"UV_INDEX_STRATEGY": "unsafe-best-match", **translated, **os.environ}


def is_installed(torch: str) -> bool:
    """Return whether this version of torch, in any build, is in the environment."""
    name = torch.replace("==", "-")
    return any(
        [*VENV.glob(f"lib/*/site-packages/{name}.dist-info"), *VENV.glob(f"lib/*/site-packages/{name}+*.dist-info")]
    )


def install_from_folders(torch: str, folders: list[str], env: dict[str, str]) -> bool:
    """Install a wheel of torch that lies in one of the folders; False where none fits this Python and machine."""
    if not folders:
        return False
    options = [option for folder in folders for option in ("--find-links", folder)]
    command = [*UV_INSTALL, "--no-deps", "--no-index", *options, torch]  # so that the disk alone is asked
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=False).returncode == 0


def torch_backend(torch: str, env: dict[str, str]) -> list[str]:
    """Give uv's option for torch's build from PyTorch's index. Without access, print a line and give none."""
    option = ["--torch-backend", os.environ.get("UV_TORCH_BACKEND", "auto")]
    command = [*UV_INSTALL, "--dry-run", "--no-deps", *option, torch]
    env = {**env, "UV_HTTP_RETRIES": "0"}
    try:
        probe = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
        if probe.returncode == 0:
            return option
        reason = probe.stderr.strip().rpartition("\n")[2].strip()
    except subprocess.TimeoutExpired:
        reason = f"no answer in {PROBE_SECONDS:.0f} s"
    say(f"PyTorch's own index does not give {torch} ({reason}): taking the build that the package index has")
    return []


def editable(projects: list[str]) -> list[str]:
    """Give the options that install projects from where they lie."""
    return [option for project in projects for option in ("--editable", project)]


def install_with_uv(torch: str, projects: list[str]) -> bool:
    """Install all with uv; False, with a line, where pip cannot fetch uv or uv fails. Raises CalledProcessError."""
    fetch = [*PIP_INSTALL, *CONSTRAINTS, "--only-binary", "uv", "uv"]
    if subprocess.run(fetch, cwd=ROOT, capture_output=True, check=False).returncode:
        say("uv cannot be had here: pip installs instead, which takes longer")
        return False
    settings = pip_settings()
    env = uv_environment(settings)
    folders, _ = find_links(settings)
    backend: list[str] = []
    if not is_installed(torch) and not install_from_folders(torch, folders, env):
        backend = torch_backend(torch, env)
    constraints = [option for file in settings.get("constraint", "").split() for option in ("--constraint", file)]
    command = [*UV_INSTALL, *CONSTRAINTS, *constraints, *backend, torch, *editable(projects)]
    if subprocess.run(command, cwd=ROOT, env=env, check=False).returncode:
        say("uv failed: pip tries")
        return False
    mend_soundfile()
    return True


def mend_soundfile() -> None:
    """Install soundfile with pip where uv took the wheel without libsndfile, and the system has no such library.

    Of wheels of one version, uv takes those of the first index that has any, pip the one that fits this machine best.
    Raises CalledProcessError.
    """
    if subprocess.run([PYTHON, "-I", "-c", "import soundfile"], cwd=ROOT, capture_output=True, check=False).returncode:
        again = [*PIP_INSTALL, *CONSTRAINTS, "--force-reinstall", "--no-deps", "soundfile"]
        subprocess.run(again, cwd=ROOT, check=True)


def install_with_pip(torch: str, projects: list[str]) -> None:
    """Install all with pip. Raises CalledProcessError."""
    subprocess.run([*PIP_INSTALL, torch], cwd=ROOT, check=True)
    subprocess.run([*PIP_INSTALL, *CONSTRAINTS, *editable(projects)], cwd=ROOT, check=True)


def main(torch: str, *projects: str) -> int:
    """Install torch and projects of this checkout; 0 when all is there, 1 when a step failed, 130 after Ctrl-C."""
    if sys.version_info < (3, 11):  # noqa: UP036 - make takes whichever python3 comes first
        say(f"Python 3.11 or newer is needed, and {sys.executable} is older: make PYTHON=python3.12 run, say")
        return 1
    try:
        make_environment()
        if not install_with_uv(torch, list(projects)):
            install_with_pip(torch, list(projects))
        INCOMPLETE.unlink(missing_ok=True)
    except subprocess.CalledProcessError:
        return 1  # its output says why
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
