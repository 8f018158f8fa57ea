"""API keys: which requests are let in, what each tenant sees, and what its limits refuse."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from deploy.local.servers.embedded import NatsServer, S3Server
from heartmula_client.client import AsyncClient
from heartmula_client.errors import Refused
from services.gateway.auth.api_keys import digest_of_key
from tests.integration.gateway_fixtures import (
    SONG,
    RunningGateway,
    Watcher,
    eventually,
    fresh_settings,
    running_gateway,
)

ALICE, BOB = {"Authorization": "Bearer key-of-alice"}, {"Authorization": "Bearer key-of-bob"}


def entry(name: str, *limits: str) -> str:
    return "\n".join(("[[tenant]]", f'name = "{name}"', f'keys = ["{digest_of_key(f"key-of-{name}")}"]', *limits, ""))


def write(gateway: RunningGateway, *entries: str) -> None:
    path = gateway.settings.api_keys
    assert path is not None
    new = path.with_suffix(".new")
    new.write_text("\n".join(entries))
    new.replace(path)


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("keys")
    settings = await fresh_settings(nats_server, s3_server, folder)
    (folder / "keys.toml").write_text(entry("alice") + entry("bob"))
    settings = replace(settings, api_keys=folder / "keys.toml", cors_origins="https://songs.example")
    async with running_gateway(settings, folder) as gateway:
        yield gateway


async def submit(gateway: RunningGateway, who: dict[str, str], **values: Any) -> str:
    answer = await gateway.http.post("/generate", json=SONG | values, headers=who)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


async def close_code(gateway: RunningGateway, job_id: str, headers: dict[str, str]) -> int:
    url = f"{gateway.base.replace('http', 'ws', 1)}/generate/{job_id}/events"
    async with websockets.connect(url, proxy=None, additional_headers=headers) as connection:
        return (await Watcher(connection).rest())[1]


async def test_nothing_about_songs_is_answered_without_a_key(gateway: RunningGateway) -> None:
    job_id = await submit(gateway, ALICE)
    base = f"/generate/{job_id}"
    routes = [("GET", p) for p in ("/generate", base, f"{base}/status", f"{base}/result", f"{base}/peaks")]
    routes += [
        ("GET", f"{base}/stream"),
        ("GET", f"{base}/events"),
        ("GET", "/api/gpu"),
        ("GET", "/api/session"),
        ("DELETE", base),
    ]
    routes += [("POST", "/generate"), ("POST", "/api/fit"), ("POST", "/api/session")]
    wrong: tuple[dict[str, str], ...] = (
        {},
        {"Authorization": "Bearer unknown"},
        {"Authorization": "Basic key-of-alice"},
        {"Authorization": "Bearer"},
    )
    for method, path in routes:
        for headers in wrong:
            answer = await gateway.http.request(method, path, headers=headers)
            assert (answer.status_code, answer.headers.get("www-authenticate")) == (401, "Bearer"), (method, path)
            assert answer.json()["type"] == "/problems/unauthorized"
    assert await close_code(gateway, job_id, {}) == 4401
    for path in ("/", "/livez", "/readyz", "/health", "/schema", "/docs", "/asyncapi.json", "/metrics"):
        answer = await gateway.http.get(path)
        assert answer.status_code == 200, path
        assert job_id not in answer.text
    assert "key-of" not in gateway.log.read_text()


async def test_a_tenant_sees_its_own_songs_only(gateway: RunningGateway) -> None:
    mine, other = await submit(gateway, ALICE), await submit(gateway, BOB)
    base = f"/generate/{mine}"
    routes = [("GET", p) for p in (base, f"{base}/status", f"{base}/result", f"{base}/peaks", f"{base}/events")]
    routes.append(("GET", f"{base}/stream"))
    for method, path in [*routes, ("DELETE", f"{base}?forget=true"), ("DELETE", base)]:
        answer = await gateway.http.request(method, path, headers=BOB)
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/unknown-job"), path
    assert await close_code(gateway, mine, BOB) == 4404
    listed = (await gateway.http.get("/generate", headers=BOB)).json()["songs"]
    assert [song["job_id"] for song in listed] == [other]

    await gateway.heartbeat("tokenizer", jobs=[mine, other])

    async def shown(who: dict[str, str]) -> list[str]:
        found = (await gateway.http.get("/api/gpu", headers=who)).json()["gpus"]
        return [job_id for gpu in found for worker in gpu["workers"] for job_id in worker["jobs"]]

    assert await eventually(lambda: shown(ALICE), "no worker is shown") == [mine]
    assert await shown(BOB) == [other]

    assert (await gateway.http.delete(base, headers=ALICE)).status_code == 200
    async with websockets.connect(
        f"{gateway.base.replace('http', 'ws', 1)}{base}/events", proxy=None, additional_headers=ALICE
    ) as connection:
        frames, code = await Watcher(connection).rest()
    assert (frames[-1]["status"], code) == ("cancelled", 1000)


async def test_two_tenants_may_use_the_same_idempotency_key(gateway: RunningGateway) -> None:
    same = {"Idempotency-Key": "k"}
    answers = [
        await gateway.http.post("/generate", json=SONG | {"variants": 2, "seed": seed}, headers=who | same)
        for who, seed in ((ALICE, 1), (BOB, 2), (ALICE, 1))
    ]
    assert [answer.status_code for answer in answers] == [202] * 3
    ids = [{song["job_id"] for song in answer.json()["variants"]} for answer in answers]
    assert ids[0] == ids[2]
    assert not ids[0] & ids[1]


async def test_nats_clients_name_a_tenant_that_exists(gateway: RunningGateway) -> None:
    async def ask(tenant: str) -> dict[str, Any]:
        data = json.dumps(SONG).encode()
        answer: dict[str, Any] = json.loads((await gateway.nc.request(f"submit.{tenant}", data, timeout=10)).data)
        return answer

    taken = await ask("alice")
    assert (await gateway.http.get(taken["status_url"], headers=ALICE)).status_code == 200
    assert (await gateway.http.get(taken["status_url"], headers=BOB)).status_code == 404
    for unknown in ("local", "carol"):
        assert (await ask(unknown))["error"]["code"] == 401


async def test_a_session_carries_the_key_and_other_sites_cannot_use_it(gateway: RunningGateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.base, trust_env=False) as browser:
        begun = await browser.post("/api/session", headers=ALICE)
        assert begun.status_code == 204
        header = begun.headers["set-cookie"].lower()
        assert all(part in header for part in ("httponly", "samesite=strict", "path=/"))
        assert "secure" not in header
        behind = await browser.post("/api/session", headers=ALICE | {"X-Forwarded-Proto": "https"})
        assert "secure" in behind.headers["set-cookie"].lower()
        cookie = {"Cookie": "heartmula_key=key-of-alice"}
        assert (await gateway.http.get("/api/session", headers=cookie)).json()["tenant"] == "alice"
        job_id = (await gateway.http.post("/generate", json=SONG, headers=cookie | {"Origin": gateway.base})).json()[
            "job_id"
        ]
        elsewhere: list[dict[str, str]] = [
            {"Origin": "http://127.0.0.1:1"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "cross-site"},
        ]
        for headers in elsewhere:
            assert (await gateway.http.get("/generate", headers=cookie | headers)).status_code == 401
            assert await close_code(gateway, job_id, cookie | headers) == 4401
        form = await gateway.http.post("/generate", data={"lyrics": "la"}, headers=cookie)
        assert form.status_code == 415
        assert (await gateway.http.delete(f"/generate/{job_id}", headers=ALICE)).status_code == 200
        assert await close_code(gateway, job_id, cookie | {"Origin": gateway.base}) == 1000
        over = await gateway.http.delete("/api/session", headers=cookie)
        assert over.status_code == 204
        assert "max-age=0" in over.headers["set-cookie"].lower()
        # A header is never made up for by the cookie.
        assert (await gateway.http.get("/generate", headers=cookie | {"Authorization": "Bearer x"})).status_code == 401


async def test_a_foreign_origin_needs_a_valid_authorization_header_and_any_host_is_answered(
    gateway: RunningGateway,
) -> None:
    foreign = {"Origin": "https://evil.example"}
    job_id = await submit(gateway, ALICE | foreign | {"Host": "songs.example"})
    cookie = {"Cookie": "heartmula_key=key-of-alice"}
    base = f"/generate/{job_id}"
    for headers in (foreign, foreign | cookie, foreign | {"Authorization": "Bearer guessed"}):
        for method, path in (("POST", "/generate"), ("DELETE", base), ("GET", f"{base}/events")):
            answer = await gateway.http.request(method, path, json=SONG, headers=headers)
            assert (answer.status_code, answer.json()["type"]) == (403, "/problems/foreign-origin"), (method, path)
        assert await close_code(gateway, job_id, headers) == 4401
    assert (await gateway.http.delete(base, headers=ALICE | foreign)).status_code == 200
    assert await close_code(gateway, job_id, ALICE | foreign) == 1000


async def test_pages_of_listed_origins_may_ask_with_a_key(gateway: RunningGateway) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = await gateway.http.options("/generate", headers={"Origin": "https://songs.example"} | asks)
    assert allowed.headers["access-control-allow-origin"] == "https://songs.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    answer = await gateway.http.get("/generate", headers=ALICE | {"Origin": "https://songs.example"})
    assert answer.headers["access-control-allow-origin"] == "https://songs.example"
    assert "access-control-allow-credentials" not in answer.headers
    for name in ("etag", "location", "retry-after", "content-range"):
        assert name in answer.headers["access-control-expose-headers"].lower()
    refused = await gateway.http.options("/generate", headers={"Origin": "https://evil.example"} | asks)
    assert "access-control-allow-origin" not in refused.headers


async def test_limits_are_each_tenants_own_and_keys_can_be_revoked(gateway: RunningGateway) -> None:
    write(gateway, entry("alice"), entry("bob"), entry("carol", "songs_per_minute = 0.01", "burst = 2"))
    carol = {"Authorization": "Bearer key-of-carol"}

    async def known() -> bool:
        return (await gateway.http.get("/api/session", headers=carol)).status_code == 200

    async def revoked() -> bool:
        return not await known()

    await eventually(known, "the new key was not read")
    await submit(gateway, carol)
    repeat = carol | {"Idempotency-Key": "again"}
    first = await submit(gateway, repeat)
    assert await submit(gateway, repeat) == first  # no new song
    answer = await gateway.http.post("/generate", json=SONG, headers=carol)
    assert (answer.status_code, answer.json()["type"]) == (429, "/problems/too-many-requests")
    assert int(answer.headers["retry-after"]) > 0
    endless = SONG | {"max_duration_ms": 3_600_000}  # only the tokenizer can tell that it fits no model
    assert (await gateway.http.post("/generate", json=endless, headers=carol)).status_code == 429
    await submit(gateway, ALICE)

    write(gateway, "[[tenant]]\nname = 1")
    await eventually(lambda: _said(gateway, "the keys stay as they were"), "a broken file was not logged")
    assert await known()
    write(gateway, entry("alice"), entry("bob"))
    await eventually(revoked, "the key still works")


async def _said(gateway: RunningGateway, words: str) -> bool:
    await gateway.http.get("/generate", headers=ALICE)
    return words in gateway.log.read_text()


async def test_songs_at_once_length_and_priority_are_limited(gateway: RunningGateway) -> None:
    limits = ("songs_at_once = 2", "max_duration_ms = 3000")
    write(gateway, entry("alice"), entry("bob"), entry("dora", *limits))
    dora = {"Authorization": "Bearer key-of-dora"}

    async def known() -> bool:
        return (await gateway.http.get("/api/session", headers=dora)).status_code == 200

    await eventually(known, "the new key was not read")
    session = (await gateway.http.get("/api/session", headers=dora)).json()
    assert (session["limits"]["songs_at_once"], session["limits"]["priority"]) == (2, False)
    short = {name: value for name, value in SONG.items() if name != "max_duration_ms"}
    text = {"lyrics": SONG["lyrics"]}
    longest = [
        (await gateway.http.post("/api/fit", json=text, headers=by)).json()["longest_ms"] for by in (dora, ALICE)
    ]
    assert longest[0] == 3000 < longest[1]
    for more, field in (({"max_duration_ms": 3001}, "max_duration_ms"), ({"priority": "high"}, "priority")):
        answer = await gateway.http.post("/generate", json=short | more, headers=dora)
        assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert (await gateway.http.post("/generate", json=short | {"variants": 3}, headers=dora)).status_code == 422
    answers = await asyncio.gather(*(gateway.http.post("/generate", json=short, headers=dora) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [202, 202, 429, 429, 429, 429]
    job_id = next(answer.json()["job_id"] for answer in answers if answer.status_code == 202)
    song = (await gateway.http.get(f"/generate/{job_id}", headers=dora)).json()
    assert song["request"]["max_duration_ms"] == 3000
    assert (await gateway.http.delete(f"/generate/{job_id}", headers=dora)).status_code == 200
    answer = await gateway.http.post("/generate", json=short, headers=dora)
    assert answer.status_code == 202


async def test_the_client_sends_its_key(gateway: RunningGateway) -> None:
    async with AsyncClient(gateway.base) as without_key:
        with pytest.raises(Refused) as refused:
            await without_key.songs()
    assert refused.value.status == 401
    async with AsyncClient(gateway.base, key="key-of-mallory") as mallory:
        with pytest.raises(Refused, match="not known"):
            await mallory.songs()
    async with AsyncClient(gateway.base, key="key-of-alice") as alice:
        accepted = await alice.generate("la la", max_duration_ms=4000)
        await alice.cancel(accepted.job_id)
        assert [event.status async for event in alice.watch(accepted.job_id)][-1] == "cancelled"
    env = os.environ | {"HEARTMULA_URL": gateway.base, "HEARTMULA_API_KEY": "key-of-alice"}
    command = (sys.executable, "-m", "heartmula_client", "status", accepted.job_id)
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert "cancelled" in out.decode()


def test_a_wrong_file_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text('[[tenant]]\nname = "alice"\nkeys = ["key-of-alice"]\n')
    env = {name: value for name, value in os.environ.items() if not name.startswith("HEARTMULA_")}
    env |= {"HEARTMULA_API_KEYS": str(tmp_path / "keys.toml"), "HEARTMULA_NATS_URL": "nats://127.0.0.1:1"}
    env |= {
        "HEARTMULA_S3_ENDPOINT": "http://127.0.0.1:1",
        "HEARTMULA_S3_ACCESS_KEY": "a",
        "HEARTMULA_S3_SECRET_KEY": "b",
    }
    done = subprocess.run(
        [sys.executable, "-m", "services.gateway"], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "SHA-256" in done.stderr
    assert "key-of-alice" not in done.stderr
    assert "Traceback" not in done.stderr
