"""The documents of the API in the eyes of Spectral, a linter that others use."""

import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.acceptance.running_stack import RunningStack
from tests.real.commands import PATH, found

SPECTRAL = "@stoplight/spectral-cli@6.16.3"


@pytest.mark.parametrize(("document", "rules"), [("schema", "oas"), ("asyncapi.json", "asyncapi")])
def test_spectral_finds_no_error(stack: RunningStack, document: str, rules: str, tmp_path: Path) -> None:
    npx = found("npx")
    if npx is None:
        pytest.skip("not on the PATH: npx")
    (tmp_path / "document.json").write_text(httpx.get(f"{stack.url}/{document}", trust_env=False).text)
    (tmp_path / "rules.yaml").write_text(f"extends: spectral:{rules}\n")
    arguments = ("lint", "document.json", "--ruleset", "rules.yaml", "--format", "json", "--fail-severity", "error")
    command = [npx, "--yes", SPECTRAL, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [item for item in json.loads(done.stdout[: done.stdout.rindex("]") + 1]) if item["severity"] == 0] == []
