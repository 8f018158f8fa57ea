"""The documents of the API against the gateway itself: by random requests, by a generated client, by what is sent."""

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.local.servers import NatsServer, S3Server
from shared.messages import Failed
from tests.integration.gateway_fixtures import House, fresh_settings, open_house

SECONDS = 60  # of random requests

_CONFIG = """
[dictionaries.songs]
values = [{songs}]

[dictionaries.ended]
values = [{ended}]

[parameters]
"path.job_id" = {{ dictionary = "songs", probability = 0.7 }}

[[operations]]
include-name = "GET /generate/{{job_id}}/events"
parameters = {{ "path.job_id" = {{ dictionary = "ended", probability = 0.7 }} }}
"""


@pytest.fixture(scope="module")
async def house(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("gateway-schema")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with open_house(settings, folder, queue_limit=300) as house:
        yield house


async def run(folder: Path, *command: str) -> str:
    """Run a module of this environment; returns what it wrote."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_random_requests_are_answered_as_documented(house: House, tmp_path: Path) -> None:
    waiting, running, completed, failed, cancelled = [await house.submit(title=f"{n}") for n in range(5)]
    await house.become(running, "generating")
    await house.complete(completed)
    await house.become(failed, "generating", "failed", error="no")
    await house.tell(Failed(job_id=failed, status="failed", progress=0, error="no"))
    await house.http.delete(f"/generate/{cancelled}")
    ended = ", ".join(f'"{job_id}"' for job_id in (completed, failed, cancelled))
    songs = f'{ended}, "{waiting}", "{running}"'
    (tmp_path / "schemathesis.toml").write_text(_CONFIG.format(songs=songs, ended=ended))
    await run(
        tmp_path,
        "schemathesis.cli",
        "run",
        f"{house.base}/schema",
        f"--max-time={SECONDS}",
        "--max-examples=60",
        "--seed=1",
        "--no-color",
        "--continue-on-failure",
        "--request-timeout=20",
        # What is right by the document may still be too much for the model, or blank.
        "--exclude-checks=positive_data_acceptance",
        "--generation-database=none",
    )
    assert "Traceback" not in house.log.read_text()


_CLIENT = """
post_hooks: []
content_type_overrides: {audio/flac: application/octet-stream, audio/wav: application/octet-stream,
                         audio/mpeg: application/octet-stream}
"""


async def test_a_generated_client_gets_a_song_made(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "client.yml").write_text(_CLIENT)
    options = ("--meta=none", "--output-path=songs_client", "--config=client.yml", "--fail-on-warning")
    await run(tmp_path, "openapi_python_client", "generate", f"--url={house.base}/schema", *options)
    monkeypatch.syspath_prepend(tmp_path)
    client_module, models, generate, status, result = (
        importlib.import_module(f"songs_client{name}")
        for name in ("", ".models", ".api.songs.generate", ".api.songs.status", ".api.songs.result")
    )
    async with client_module.Client(base_url=house.base, httpx_args={"trust_env": False}) as client:
        accepted = await generate.asyncio(client=client, body=models.GenerateRequest(lyrics="la", seed=7))
        assert isinstance(accepted, models.AcceptedBody)
        job_id = accepted.job_id
        early = await result.asyncio(job_id, client=client)
        assert (early.type_, early.status) == ("/problems/not-ready", 409)
        assert (await status.asyncio(job_id, client=client)).status == "queued"
        await house.complete(job_id, b"audio")
        told = await status.asyncio(job_id, client=client)
        assert (told.status, told.progress, told.seed) == ("completed", 100, 7)
        audio = await result.asyncio(job_id, client=client)
        assert audio.payload.read() == b"audio"
        part = await result.asyncio_detailed(job_id, client=client, range_="bytes=1-2")
        assert (part.status_code, part.headers["content-range"], part.content) == (206, "bytes 1-2/5", b"ud")
        wrong = await generate.asyncio(client=client, body=models.GenerateRequest(lyrics=" "))
        assert (wrong.type_, wrong.field) == ("/problems/invalid-request", "lyrics")
