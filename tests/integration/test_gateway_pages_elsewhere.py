"""Web pages of other origins, and names that were rebound to this machine: neither can use a service without keys."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import websockets

from deploy.local.servers.embedded import NatsServer, S3Server
from heartmula_client.client import AsyncClient
from tests.integration.gateway_fixtures import SONG, RunningGateway, fresh_settings, running_gateway

LISTED = "https://songs.example"
FOREIGN = ("https://evil.example", "http://127.0.0.1:1", "http://localhost", "null", "", "https://songs.example.evil")


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("elsewhere")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with running_gateway(settings, folder, cors_origins=LISTED, allowed_hosts="studio.lan") as gateway:
        yield gateway


async def handshake(gateway: RunningGateway, job_id: str, **headers: str) -> int:
    """Open a websocket; returns the status that answers its handshake."""
    url = f"{gateway.base.replace('http', 'ws', 1)}/generate/{job_id}/events"
    try:
        async with websockets.connect(url, proxy=None, additional_headers=headers):
            return 101
    except websockets.InvalidStatus as refused:
        return refused.response.status_code


async def count(gateway: RunningGateway) -> int:
    return len((await gateway.http.get("/generate", params={"limit": 100})).json()["songs"])


@pytest.mark.parametrize("origin", FOREIGN)
async def test_a_page_of_another_origin_changes_nothing_and_follows_nothing(
    gateway: RunningGateway, origin: str
) -> None:
    job_id = await gateway.submit()
    before = await count(gateway)
    headers = {"Origin": origin}
    asks = [("POST", "/generate"), ("POST", "/api/fit"), ("POST", "/api/session"), ("DELETE", "/api/session")]
    asks += [("DELETE", f"/generate/{job_id}"), ("GET", f"/generate/{job_id}/events")]
    for method, path in asks:
        for key in ({}, {"Authorization": "Bearer x"}):  # none is valid where there are none
            answer = await gateway.http.request(method, path, json=SONG, headers=headers | key)
            assert (answer.status_code, answer.json()["type"]) == (403, "/problems/foreign-origin"), (method, path)
            assert "HEARTMULA_CORS_ORIGINS" in answer.json()["detail"]
    assert await handshake(gateway, job_id, Origin=origin) == 403
    assert await count(gateway) == before
    assert (await gateway.job(job_id)).status == "queued"
    assert (await gateway.http.get("/", headers=headers)).status_code == 200  # a link leads to the page
    assert "Traceback" not in gateway.log.read_text()
    assert "ERROR" not in gateway.log.read_text()


async def test_the_services_own_pages_listed_origins_and_programs_notice_nothing(gateway: RunningGateway) -> None:
    port = gateway.settings.port
    own = [(f"http://127.0.0.1:{port}", f"127.0.0.1:{port}"), (f"http://localhost:{port}", f"localhost:{port}")]
    own += [(f"http://[::1]:{port}", f"[::1]:{port}"), (f"http://box.localhost:{port}", f"BOX.localhost:{port}")]
    own += [
        ("http://127.0.0.1", "127.0.0.1"),
        ("http://127.0.0.1", "127.0.0.1:80"),
        ("https://studio.lan", "studio.lan"),
    ]
    own += [("https://studio.lan", "studio.lan:443"), (LISTED, f"127.0.0.1:{port}"), (LISTED.upper(), "localhost")]
    for origin, host in own:
        headers = {"Origin": origin, "Host": host}
        answer = await gateway.http.post("/generate", json=SONG, headers=headers)
        assert answer.status_code == 202, (origin, host, answer.text)
        job_id = answer.json()["job_id"]
        assert (await gateway.http.delete(f"/generate/{job_id}", headers=headers)).status_code == 200
        assert (await gateway.http.get(f"/generate/{job_id}/events", headers=headers)).status_code == 200
    assert await handshake(gateway, job_id, Origin=gateway.base) == 101
    assert await handshake(gateway, job_id) == 101
    async with AsyncClient(gateway.base) as client:
        accepted = await client.generate("la la", max_duration_ms=4000)
        await client.cancel(accepted.job_id)
        assert [event.status async for event in client.watch(accepted.job_id)][-1] == "cancelled"


REBOUND = ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "notlocalhost")
MALFORMED = ("127.0.0.1@evil.example", "[::1]evil.example", "::1", "127.0.0.1:", "127.0.0.1:port")


@pytest.mark.parametrize("host", [*REBOUND, *MALFORMED])
async def test_a_name_that_was_bound_to_this_machine_reaches_nothing(gateway: RunningGateway, host: str) -> None:
    job_id = await gateway.submit()
    headers = {"Host": host, "Origin": f"http://{host}"}  # for the browser the page is of the same origin
    song = f"/generate/{job_id}"
    reads = (
        "/",
        "/generate",
        song,
        f"{song}/events",
        "/api/gpu",
        "/schema",
        "/docs",
        "/static/app.js",
        "/asyncapi.json",
    )
    asks = [*(("GET", path) for path in reads), ("DELETE", song), ("POST", "/generate"), ("POST", "/api/fit")]
    for method, path in asks:
        answer = await gateway.http.request(method, path, json=SONG, headers=headers)
        assert (answer.status_code, answer.json()["type"]) == (421, "/problems/unknown-host"), (method, path)
        assert "HEARTMULA_ALLOWED_HOSTS" in answer.json()["detail"]
    assert (await gateway.job(job_id)).status == "queued"
    for path in ("/livez", "/readyz", "/health", "/metrics"):  # kubelets and Prometheus have names of theirs
        assert (await gateway.http.get(path, headers=headers)).status_code == 200


@pytest.mark.parametrize("host", REBOUND)
async def test_a_websocket_under_a_foreign_name_is_refused(gateway: RunningGateway, host: str) -> None:
    assert await handshake(gateway, await gateway.submit(), Host=host, Origin=f"http://{host}") == 421
    assert "ERROR" not in gateway.log.read_text()


LOOPBACK = (
    "localhost",
    "LocalHost:80",
    "localhost.",
    "a.b.localhost:1",
    "127.0.0.1",
    "127.8.8.8:1",
    "[::1]",
    "[::1]:80",
)
ADDRESSES = ("10.0.0.7:8000", "0.0.0.0", "[fd00::7]:8000", "[fe80::1%eth0]")
NAMED = ("studio.lan", "Studio.LAN:8443", "studio.lan.")


@pytest.mark.parametrize("host", [*LOOPBACK, *ADDRESSES, *NAMED])
async def test_names_of_this_machine_addresses_and_listed_names_are_answered(
    gateway: RunningGateway, host: str
) -> None:
    assert (await gateway.http.get("/generate", headers={"Host": host})).status_code == 200


async def test_a_request_of_http_1_0_needs_no_host(gateway: RunningGateway) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.settings.port)
    writer.write(b"GET /generate HTTP/1.0\r\n\r\n")
    assert (await reader.readline()).split()[1] == b"200"
    writer.close()


@pytest.mark.parametrize("path", ["/generate", "/api/fit"])
async def test_a_body_needs_its_content_type(gateway: RunningGateway, path: str) -> None:
    for headers in ({}, {"Content-Type": ""}, {"Content-Type": "text/plain"}):
        answer = await gateway.http.post(path, content=b'{"lyrics": "la", "tags": ""}', headers=headers)
        assert (answer.status_code, answer.json()["type"]) == (415, "/problems/unsupported-media-type")
        assert "Content-Type: application/json" in answer.json()["detail"]
