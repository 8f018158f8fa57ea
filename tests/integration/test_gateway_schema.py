"""The documents of the API, checked against the gateway: by random requests, a generated client, and sent messages."""

import asyncio
import importlib
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server
from shared.audio.files import AudioWriter
from shared.audio.forms import plain
from shared.audio.tags import SongTags
from shared.schema.event import Failed
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, running_gateway
from tests.unit.recordings import file_of, music

SECONDS = 12  # of random requests

_CONFIG = """
[dictionaries.songs]
values = [{songs}]

[dictionaries.recordings]
values = ["{recording}"]

[dictionaries.ended]
values = [{ended}]

[parameters]
"path.job_id" = {{ dictionary = "songs", probability = 0.7 }}
"path.recording_id" = {{ dictionary = "recordings", probability = 0.7 }}

[checks.negative_data_rejection]
expected-statuses = [400, 404, 405, 409, 410, 413, 415, 422, 429]  # its own lack 410 and 413

[dictionaries.made]
values = ["{made}"]

[dictionaries.ranges]
values = ["bytes=0-9", "bytes=7-", "bytes=-3", "bytes=999999999-"]

[[operations]]
include-path-regex = "/(result|peaks|stream)$"
[operations.parameters]
"path.job_id" = {{ dictionary = "made", probability = 0.8 }}
"header.Range" = {{ dictionary = "ranges", probability = 0.5 }}

[[operations]]
include-path-regex = "^/recordings/.*/audio$"
[operations.parameters]
"header.Range" = {{ dictionary = "ranges", probability = 0.5 }}

[dictionaries.doomed]
values = [{doomed}]

[[operations]]
include-method = "DELETE"
parameters = {{ "path.job_id" = {{ dictionary = "doomed", probability = 0.7 }} }}

# It waits for the audio of songs that are never made here.
[[operations]]
include-name = "GET /generate/{{job_id}}/stream"
phases.coverage.enabled = false
phases.stateful.enabled = false

[[operations]]
include-name = "GET /generate/{{job_id}}/events"
parameters = {{ "path.job_id" = {{ dictionary = "ended", probability = 0.7 }} }}
"""


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-schema")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with running_gateway(settings, folder, queue_limit=300, engine="trivial") as gateway:
        yield gateway


async def run(folder: Path, *command: str) -> str:
    """Run a module of this environment; returns its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_random_requests_are_answered_as_documented(gateway: RunningGateway, tmp_path: Path) -> None:
    waiting, running, completed, failed, cancelled = [await gateway.submit(title=f"{n}") for n in range(5)]
    await gateway.move_to(running, "generating")
    with AudioWriter(
        tmp_path / "song", plain("flac"), 8000, SongTags.of((await gateway.job(completed)).request)
    ) as writer:
        writer.write(np.zeros((8000, 2), np.float32))
    await gateway.complete(completed, (tmp_path / "song").read_bytes())
    await gateway.move_to(failed, "generating", "failed", error="no")
    await gateway.publish(Failed(job_id=failed, status="failed", progress=0, error="no"))
    await gateway.http.delete(f"/generate/{cancelled}")
    ended = ", ".join(f'"{job_id}"' for job_id in (completed, failed, cancelled))
    songs = f'{ended}, "{waiting}", "{running}"'
    doomed = ", ".join([f'"{await gateway.submit()}"' for _ in range(20)])
    recording = (await gateway.http.post("/recordings", content=file_of("wav", music(1.5)))).json()["recording_id"]
    config = _CONFIG.format(songs=songs, ended=ended, doomed=doomed, made=completed, recording=recording)
    (tmp_path / "schemathesis.toml").write_text(config)
    await run(
        tmp_path,
        "schemathesis.cli",
        "run",
        f"{gateway.base}/schema",
        f"--max-time={SECONDS}",
        "--max-examples=30",
        "--seed=1",
        "--no-color",
        "--continue-on-failure",
        "--request-timeout=20",
        # What is right by the document may still be too much for the model, or blank. DELETE cancels: the song stays.
        "--exclude-checks=positive_data_acceptance,use_after_free",
        "--generation-database=none",
    )
    assert "Traceback" not in gateway.log.read_text()


async def test_a_generated_client_gets_a_song_made(
    gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "client.yml").write_text("post_hooks: []")  # without a formatter
    options = ("--meta=none", "--output-path=songs_client", "--config=client.yml", "--fail-on-warning")
    said = await run(tmp_path, "openapi_python_client", "generate", f"--url={gateway.base}/schema", *options)
    assert said == "Generating songs_client\n"
    monkeypatch.syspath_prepend(tmp_path)
    client_module, models, types, generate, status, result, stream, upload = (
        importlib.import_module(f"songs_client{name}")
        for name in (
            *("", ".models", ".types"),
            *(f".api.songs.{name}" for name in ("generate", "status", "result", "stream")),
            ".api.recordings.upload_recording",
        )
    )
    async with client_module.Client(base_url=gateway.base, httpx_args={"trust_env": False}) as client:
        accepted = await generate.asyncio(client=client, body=models.GenerateRequest(lyrics="la", seed=7))
        assert isinstance(accepted, models.AcceptedBody)
        job_id = accepted.job_id
        early = await result.asyncio(job_id, client=client)
        assert (early.type_, early.status) == ("/problems/not-ready", 409)
        assert (await status.asyncio(job_id, client=client)).status == "queued"
        await gateway.complete(job_id, b"audio")
        found = await status.asyncio(job_id, client=client)
        assert (found.status, found.progress, found.seed) == ("completed", 100, 7)
        audio = await result.asyncio(job_id, client=client)
        assert audio.payload.read() == b"audio"
        assert (await stream.asyncio(job_id, client=client)).payload.read() == b"audio"
        part = await result.asyncio_detailed(job_id, client=client, range_="bytes=1-2")
        assert (part.status_code, part.headers["content-range"], part.content) == (206, "bytes 1-2/5", b"ud")
        wrong = await generate.asyncio(client=client, body=models.GenerateRequest(lyrics=" "))
        assert (wrong.type_, wrong.field) == ("/problems/invalid-request", "lyrics")
    recording = file_of("wav", music(1.5))
    form = models.UploadRecordingFilesBody(file=types.File(BytesIO(recording), "hum.wav", "audio/wav"))
    for body in (types.File(BytesIO(recording)), form):  # the function without asyncio: the other reads no file
        with client_module.Client(base_url=gateway.base, httpx_args={"trust_env": False}) as client:
            uploaded = await asyncio.to_thread(upload.sync, client=client, body=body)
            assert (uploaded.status, uploaded.upload_format) == ("queued", "wav")


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/octet-stream", "application/octet-stream"),
        ("application/json;q=0.1, Application/Octet-Stream;q=0.9", "application/octet-stream"),
        ("application/octet-stream, audio/*", "audio/flac"),
        ("application/octet-stream, */*;q=0.1", "audio/flac"),
        ("text/html", "audio/flac"),
    ],
)
async def test_audio_has_the_name_of_bytes_for_clients_that_know_no_audio(
    gateway: RunningGateway, accept: str, kind: str
) -> None:
    job_id = await gateway.submit()
    await gateway.complete(job_id)
    for path in ("result", "stream"):
        answer = await gateway.http.get(f"/generate/{job_id}/{path}", headers={"Accept": accept})
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)


# --- the documents


async def document(gateway: RunningGateway, path: str) -> dict[str, Any]:
    answer = await gateway.http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    found: dict[str, Any] = answer.json()
    return found


def resolve(whole: dict[str, Any], reference: str) -> Any:
    """Resolve a reference within a document. Raises `KeyError`."""
    found: Any = whole
    for name in reference.removeprefix("#/").split("/"):
        found = found[name]
    return found


def references(part: Any) -> Iterator[str]:
    """All references in a part of a document."""
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


async def test_every_operation_is_documented_alike(gateway: RunningGateway) -> None:
    schema = await document(gateway, "/schema")
    assert schema == await document(gateway, "/schema/openapi.json")
    operations = [operation for item in schema["paths"].values() for operation in item.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert {"generate", "listing", "status", "result", "cancel", "event_stream", "health", "livez", "readyz"} <= {
        *names
    }
    for operation in operations:
        assert operation["summary"].endswith(".")
        assert operation["tags"][0] in {tag["name"] for tag in schema["tags"]}
        assert "500" in operation["responses"]
        for code, answer in operation["responses"].items():
            assert answer["description"]
            if code in ("429", "503") and "application/problem+json" in answer.get("content", {}):
                assert "Retry-After" in answer["headers"]
    listing = schema["paths"]["/generate"]["get"]
    assert listing["security"] == [{"key": []}, {}]
    assert "WWW-Authenticate" in listing["responses"]["401"]["headers"]
    assert "401" not in schema["paths"]["/livez"]["get"]["responses"]
    result = schema["paths"]["/generate/{job_id}/result"]["get"]["responses"]
    assert {"200", "206", "304", "404", "409", "410", "416"} <= result.keys()
    assert {"audio/flac", "audio/wav", "audio/mpeg"} <= result["206"]["content"].keys()
    assert "Content-Range" in result["206"]["headers"]
    for reference in references(schema):
        resolve(schema, reference)
    shown = {name: found["examples"] for name, found in schema["components"]["schemas"].items() if "examples" in found}
    assert {"AcceptedBody", "StatusBody", "CancelledBody"} <= shown.keys()
    for name, (example,) in shown.items():
        found = schema["components"]["schemas"][name] | {"components": schema["components"]}
        jsonschema_rs.validator_for(found).validate(example)


async def test_the_asyncapi_document_is_whole(gateway: RunningGateway) -> None:
    """The document meets the rules of AsyncAPI 3.0.0 for the parts that are used here."""
    whole = await document(gateway, "/asyncapi.json")
    assert whole["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= whole["info"].keys()
    for reference in references(whole):
        resolve(whole, reference)
    for server in whole["servers"].values():
        assert {"host", "protocol"} <= server.keys()
    for channel in whole["channels"].values():
        assert set(re.findall(r"{(\w+)}", channel["address"] or "")) == channel.get("parameters", {}).keys()
        assert channel["messages"]
    for operation in whole["operations"].values():
        assert operation["action"] in ("send", "receive")
        assert operation["channel"]["$ref"].startswith("#/channels/")
    reply = whole["operations"]["takeSong"]["reply"]
    assert resolve(whole, reply["channel"]["$ref"])["address"] is None  # known at run time alone
    assert "discriminator" not in str(whole)  # a string there, an object in what msgspec makes


def check(whole: dict[str, Any], message: str, value: Any) -> None:
    """Check a value against the schema of this name in the AsyncAPI document."""
    payload = whole["components"]["messages"][message]["payload"]
    jsonschema_rs.validator_for({**payload, "components": whole["components"]}).validate(value)


async def test_what_is_sent_is_what_the_asyncapi_document_says(gateway: RunningGateway) -> None:
    whole = await document(gateway, "/asyncapi.json")
    job_id = await gateway.submit()
    async with gateway.watch(job_id, after=0) as watcher:
        await gateway.move_to(job_id, "generating")
        await gateway.stage(job_id)
        await gateway.progress(job_id, 40)
        await gateway.complete(job_id)
        frames, _ = await watcher.rest()
    kinds = {frame["type"].removeprefix("heartmula.song."): frame for frame in frames}
    assert kinds.keys() == {"snapshot", "queued", "stage", "progress", "completed"}
    for kind, frame in kinds.items():
        check(whole, kind, frame)
    with pytest.raises(jsonschema_rs.ValidationError):
        check(whole, "stage", kinds["progress"])

    subject = whole["channels"]["submit"]["address"].format(tenant="local")
    taken = await gateway.nc.request(subject, b'{"lyrics": "la"}', timeout=10)
    check(whole, "taken", json.loads(taken.data))
    refused = await gateway.nc.request(subject, b'{"lyrics": 1}', timeout=10)
    check(whole, "refused", json.loads(refused.data))
    subject = whole["channels"]["lookup"]["address"].format(tenant="local", job_id=job_id)
    check(whole, "record", json.loads((await gateway.nc.request(subject, b"", timeout=10)).data))
    subject = whole["channels"]["events"]["address"].format(tenant="local", job_id=job_id, kind="stage")
    stored = await gateway.js.get_msg("EVENTS", subject=subject)
    check(whole, "stage", json.loads(stored.data or b""))


# --- what every answer carries


@pytest.mark.parametrize(
    "path",
    ["/", "/static/app.js", "/docs", "/docs/swagger-ui.css", "/schema", "/health", "/none", "/generate/x"],
)
async def test_every_answer_carries_the_security_headers(gateway: RunningGateway, path: str) -> None:
    headers = (await gateway.http.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    policy = headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["content-type"].count("charset") <= 1


async def test_audio_carries_the_security_headers(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    await gateway.complete(job_id)
    headers = (await gateway.http.get(f"/generate/{job_id}/result")).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


async def test_the_documentation_page_needs_no_other_host(gateway: RunningGateway) -> None:
    page = await gateway.http.get("/docs")
    assert page.status_code == 200
    assert "<script>" not in page.text
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/static/docs.js"} <= set(links)
    for link in links:
        assert link.startswith("/")
        assert (await gateway.http.get(link)).status_code == 200
    assert (await gateway.http.get("/docs/swagger-ui-bundle.js.map")).status_code == 404


async def test_options_names_every_method_of_an_address(gateway: RunningGateway) -> None:
    answer = await gateway.http.options("/generate")
    assert (answer.status_code, answer.headers["allow"]) == (204, "GET, OPTIONS, POST")
