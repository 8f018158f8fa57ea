"""heartmula-client by itself: built, installed in an empty environment, and used there as its pages say."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import soundfile

from deploy.install import pip_settings, uv_environment
from deploy.local.servers.embedded import NatsServer, S3Server
from tests.integration.flow import PATIENCE, open_flow
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, running_gateway
from tests.integration.recorded import RATE, noise

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "services" / "client"
UV = [sys.executable, "-m", "uv"]


@dataclass
class Installed:
    """The package's wheel, and an environment that holds it, what it needs, and nothing else."""

    wheel: Path
    bin: Path

    async def run(self, program: str, *arguments: str, folder: Path) -> str:
        """Run a program of the environment, away from this checkout; returns what it prints."""
        return await output(self.bin / program, *arguments, cwd=folder, env={"PATH": os.environ["PATH"]})


async def output(*command: str | Path, status: int = 0, **options: Any) -> str:
    """Run a command to its end; returns what it prints."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=asyncio.subprocess.STDOUT, **options)
    async with asyncio.timeout(PATIENCE):
        out, _ = await process.communicate()
    assert process.returncode == status, out.decode()
    return out.decode()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel is built from a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "services" / "client"
    shutil.copytree(PROJECT, source, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    shutil.copy(ROOT / "LICENSE", folder)
    python = folder / "env" / "bin" / "python"
    env = uv_environment(pip_settings())

    def uv(*words: str | Path) -> None:
        subprocess.run([*UV, *words, "--quiet"], env=env, check=True)

    uv("build", "--wheel", "--out-dir", folder / "dist", source)
    (wheel,) = (folder / "dist").glob("*.whl")
    uv("venv", "--python", sys.executable, folder / "env")
    uv("pip", "install", "--python", python, "--constraint", ROOT / "constraints.txt", wheel)
    return Installed(wheel, python.parent)


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    """A running service, which makes songs and encodes recordings."""
    folder = tmp_path_factory.mktemp("service")
    settings = replace(await fresh_settings(nats_server, s3_server, folder), engine="trivial", batch=2)
    async with (
        running_gateway(settings, folder) as gateway,
        open_flow(gateway.settings, "tokenizer", "codec"),
    ):
        yield gateway


def program(page: Path, url: str) -> str:
    """The Python examples of a page, from top to bottom, for a service at another address."""
    examples = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert examples
    return "\n".join(examples).replace("http://127.0.0.1:8000", url)


@pytest.mark.parametrize("page", [PROJECT / "README.md", ROOT / "docs" / "python.md"], ids=lambda page: page.name)
async def test_the_examples_of_a_page_run_from_top_to_bottom(
    installed: Installed, gateway: RunningGateway, page: Path, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "humming.wav", noise(25), RATE)
    (tmp_path / "examples.py").write_text(program(page, gateway.base))
    await installed.run("python", "-I", "examples.py", folder=tmp_path)
    songs = [path for path in tmp_path.iterdir() if path.suffix == ".flac"]
    assert {soundfile.info(path).duration for path in songs} == {20.0}
    assert len({path.read_bytes() for path in songs}) == len(songs) // (2 if page.name == "python.md" else 1)


async def test_nothing_of_the_service_is_needed(installed: Installed, tmp_path: Path) -> None:
    names = (await installed.run("python", "-I", "-c", IMPORTED, folder=tmp_path)).split()
    assert "heartmula_client" in names
    service = {"shared", "services", "deploy", "nats", "minio", "litestar", "torch", "numpy", "click", "rich", "mcp"}
    assert service.isdisjoint(names)
    packages = await output(*UV, "pip", "list", "--python", installed.bin / "python")
    assert re.search(r"^heartmula-client ", packages, re.MULTILINE)
    assert not re.search(r"^(heartmula-jetstream|nats-py|minio|litestar|torch|numpy) ", packages, re.MULTILINE)


IMPORTED = """
import pkgutil, sys
import heartmula_client
for module in pkgutil.iter_modules(heartmula_client.__path__):
    if module.name not in ("cli", "mcp"):
        __import__(f"heartmula_client.{module.name}")
print(*{name.partition(".")[0] for name in sys.modules})
"""


async def test_the_command_line_names_its_extra_where_that_is_missing(installed: Installed, tmp_path: Path) -> None:
    said = await output(installed.bin / "heartmula", "list", status=1, cwd=tmp_path)
    assert said == "heartmula needs pip install 'heartmula-client[cli]' (click is missing)\n"


def test_the_wheel_holds_the_licence_and_says_that_it_is_typed(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert "heartmula_client/py.typed" in names
    (licence,) = [name for name in names if name.endswith("licenses/LICENSE")]
    assert zipfile.ZipFile(installed.wheel).read(licence) == (ROOT / "LICENSE").read_bytes()


TYPED = """
from pathlib import Path

from typing import assert_type

from heartmula_client import Accepted, AsyncClient, AudioFormat, Client, ContinueFrom


def make(client: Client, form: AudioFormat) -> bytes:
    accepted = client.generate("la", format=form, continue_from=ContinueFrom(job_id="2f0c"))
    assert_type(accepted, Accepted)
    for event in client.watch(accepted.job_id):
        print(event.kind, event.progress)
    assert_type(client.download(accepted.job_id, Path()), Path)
    return b"".join(client.stream(accepted.job_id, start=2.5))


async def make_too(client: AsyncClient) -> list[bytes]:
    accepted = await client.generate("la")
    return [block async for block in client.stream(accepted.job_id)]


def wrong(client: Client) -> None:
    client.generate(1)  # type: ignore[arg-type]
    client.generate("la", format="aac")  # type: ignore[arg-type]
    client.forget()  # type: ignore[call-arg]
"""


async def test_type_checkers_see_parameters_and_results(installed: Installed, tmp_path: Path) -> None:
    program = tmp_path / "typed.py"
    program.write_text(TYPED)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n[mypy-httpx.*,websockets.*]\nfollow_imports = skip\n")
    python = installed.bin / "python"
    await output(sys.executable, "-m", "mypy", "--python-executable", python, program, cwd=tmp_path)
