"""The commands of the documentation with the programs that they name, against a running stack."""

import json
import re
import time
from pathlib import Path

import httpx
import pytest
import soundfile

from tests.acceptance.running_stack import RunningStack
from tests.real.commands import PATH, Block, blocks, run
from tests.unit.recordings import file_of, music

SECONDS = 14  # of the song that the pages call 2f0c…; they go on from 12.8


@pytest.fixture(scope="module")
def song(stack: RunningStack) -> str:
    """Id of a song that is completed."""
    with httpx.Client(base_url=stack.url, trust_env=False) as http:
        request = {"lyrics": "[Verse]\nla la", "tags": "pop", "max_duration_ms": SECONDS * 1000}
        job_id = str(http.post("/generate", json=request).json()["job_id"])
        while (status := http.get(f"/generate/{job_id}/status").json()["status"]) != "completed":
            assert status in ("queued", "generating", "decoding"), status
            time.sleep(0.1)
    return job_id


@pytest.fixture
def values(stack: RunningStack, song: str) -> dict[str, str]:
    """What stands in the place of what the pages show."""
    credentials = json.loads((stack.data / "credentials.json").read_text())
    addresses = {
        **dict.fromkeys(("http://localhost:8000", "http://127.0.0.1:8000"), stack.url),
        "nats://127.0.0.1:4222": f"nats://127.0.0.1:{stack.nats_port}",
        "http://127.0.0.1:8333": f"http://127.0.0.1:{stack.s3_port}",
    }
    return addresses | {"2f0c…": song, "<job id>": song} | {f"<{name}>": found for name, found in credentials.items()}


@pytest.fixture
def environment(stack: RunningStack, tmp_path: Path) -> dict[str, str]:
    """An environment in which players make no sound, and tools have no settings of another user."""
    (tmp_path / "mpv").mkdir()
    (tmp_path / "mpv" / "mpv.conf").write_text("ao=null\n")
    credentials = json.loads((stack.data / "credentials.json").read_text())
    return {
        "PATH": PATH,
        "HOME": str(tmp_path),
        "npm_config_cache": str(Path.home() / ".npm"),
        "npm_config_yes": "true",
        "HEARTMULA_URL": stack.url,
        "MPV_HOME": str(tmp_path / "mpv"),
        "SDL_AUDIODRIVER": "dummy",
        "NATS_URL": f"nats://127.0.0.1:{stack.nats_port}",  # for blocks that are for operators
        "NATS_PASSWORD": credentials["nats_operator_password"],
    }


def test_the_pages_show_every_program() -> None:
    shown = set[str]().union(*(block.programs for block in blocks()))
    assert shown >= {"aws", "curl", "ffplay", "mpv", "nats", "npx", "openapi-python-client", "rclone"}


@pytest.mark.parametrize("block", list(blocks()), ids=str)
def test_commands(
    block: Block, values: dict[str, str], environment: dict[str, str], stack: RunningStack, song: str, tmp_path: Path
) -> None:
    if missing := block.missing():
        pytest.skip(f"not on the PATH: {', '.join(sorted(missing))}")
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "demo.mp3").write_bytes(file_of("mp3", music(2)))  # which a page uploads
    said = run(block, values, environment, folder)
    for path in (*folder.rglob("*.flac"), *folder.rglob("*.mp3")):
        assert soundfile.info(path).frames > 0
    assert "/problems/" not in said
    assert "Warning" not in said, said  # of a generator about what it leaves out
    if block.programs & {"aws", "rclone"}:
        copied = [path.read_bytes() for path in (folder / "song").glob("*.flac")]
        assert httpx.get(f"{stack.url}/generate/{song}/result", trust_env=False).content in copied
    if block.programs & {"ffplay", "mpv", "heartmula"}:
        assert not re.search(r"error|failed|invalid", said, re.IGNORECASE), said
