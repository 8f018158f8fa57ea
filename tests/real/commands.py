"""Commands of the documentation, run as a reader would who pastes a block of them into a shell."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs that others made, and how each says its version. Blocks that need more than these are not run.
PROGRAMS = {
    "aws": ("--version",),
    "curl": ("--version",),
    "ffplay": ("-version",),
    "mpv": ("--version",),
    "nats": ("--version",),
    "npx": ("--version",),
    "openapi-python-client": ("--version",),
    "rclone": ("version",),
}
OURS = {"heartmula"}
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # with what .venv has
SHELL = {"alias", "export"}
PATIENCE = 150.0  # seconds
_SCRIPT = "shopt -s expand_aliases\nset -euo pipefail\n"


@dataclass(frozen=True)
class Block:
    """A block of shell commands of a page."""

    page: str
    number: int
    text: str

    @property
    def commands(self) -> list[str]:
        """Its commands, without comments; lines that go on are joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in (re.sub(r"\s+# .*$|^# .*$", "", line).strip() for line in lines) if line]

    @property
    def programs(self) -> set[str]:
        """The programs that its commands begin with."""
        return {command.split()[0] for command in self.commands} - SHELL

    def __str__(self) -> str:
        return f"{self.page} {self.number}: " + "; ".join(c for c in self.commands if c.split()[0] not in SHELL)

    def missing(self) -> set[str]:
        """Programs that it needs and that are not on the PATH."""
        return {program for program in self.programs & PROGRAMS.keys() if not found(program)}


def blocks() -> Iterator[Block]:
    """All blocks that consist of programs of others and ours, and show at least one of the former."""
    for page in PAGES:
        found = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for number, text in enumerate(found, 1):
            block = Block(page.name, number, text)
            if block.programs & PROGRAMS.keys() and block.programs <= PROGRAMS.keys() | OURS:
                yield block


def run(block: Block, values: Mapping[str, str], environment: Mapping[str, str], folder: Path) -> str:
    """Run a block in a folder, with `values` in place of what the page shows; returns what it prints.

    Fails the test where a command fails, or where something in the block stands for a value that is not known.
    """
    script = _SCRIPT + "\n".join(_ended(command) for command in block.commands) + "\n"
    for shown, value in values.items():
        script = script.replace(shown, value)
    assert "…" not in script, script
    assert not re.search(r"<\w+>", script), script
    (folder / "script.sh").write_text(script)
    done = subprocess.run(
        ["bash", "script.sh"],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


def _ended(command: str) -> str:
    """A command that ends: `nats sub` goes on until Ctrl-C."""
    return f"({command} & sleep 3; kill $!)" if command.startswith("nats sub ") else command


def found(program: str) -> str | None:
    """The path of a program, if it is on the PATH."""
    return shutil.which(program, path=PATH)


def version(program: str) -> str:
    """What a program says about its version, or that it is not there."""
    path = found(program)
    if path is None:
        return "not on the PATH"
    said = subprocess.run([path, *PROGRAMS[program]], capture_output=True, text=True, check=False)
    return next(iter((said.stdout or said.stderr).splitlines()), "?")[:100]
