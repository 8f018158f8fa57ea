"""Who may upload, when, and how much: other connections, a gateway that stops, a checkpoint without encoder, keys."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest

from services.gateway import server as gateway_server
from services.gateway.auth.api_keys import create_key
from shared.settings import Settings
from tests.integration.gateway_fixtures import TINY, eventually, in_process
from tests.integration.uploading import DATA, Gateway, head
from tests.unit.recordings import file_of, music


async def test_an_upload_is_not_dropped_for_a_new_connection(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_server, "_most_connections", lambda: 3)
    async with in_process(settings) as found:
        gateway = Gateway(*found)
        connected = await gateway.connect(head(len(DATA), "Connection: close") + DATA[:1000])
        await gateway.begun()
        others = [await gateway.connect(b"GET / HT") for _ in range(6)]
        async with httpx.AsyncClient(base_url=gateway.base, trust_env=False) as http:
            assert (await http.get("/livez")).status_code == 200
        connected[1].write(DATA[1000:])
        assert (await gateway.answer(connected))[0] == 202
        for _, writer in others:
            writer.close()


async def test_a_gateway_that_stops_refuses_what_it_is_receiving(settings: Settings) -> None:
    async with in_process(settings) as found:
        gateway = Gateway(*found)
        connected = await gateway.connect(head(99_000_000) + bytes(2_000_000))
        await gateway.receiving()
        gateway.server.stop()
        status, lines, body = await gateway.answer(connected)
        assert (status, body["type"]) == (503, "/problems/unavailable")
        assert "shutting down" in str(body["detail"])
        assert "retry-after" in lines
        await gateway.nothing_left()


async def test_without_an_encoder_nothing_is_taken(settings: Settings) -> None:
    async with in_process(replace(settings, engine="native", model_path=TINY)) as found:
        gateway = Gateway(*found)
        status, _, body = await gateway.answer(await gateway.connect(head()))  # and no byte of the body
        assert (status, body["type"]) == (501, "/problems/no-encoder")
        assert "make models ENCODER=1" in str(body["detail"])
        await gateway.nothing_left()


@asynccontextmanager
async def with_keys(
    settings: Settings, limits: str = ""
) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient, list[str]]]:
    """A gateway with two tenants, the first with limits; and their keys."""
    (alice, first), (bob, second) = create_key("alice"), create_key("bob")
    path = settings.data_dir / "keys.toml"
    path.write_text(f"{first}{limits}\n{second}")
    async with (
        in_process(replace(settings, api_keys=path)) as found,
        httpx.AsyncClient(base_url=found[2], trust_env=False) as http,
    ):
        yield Gateway(*found), http, [alice, bob]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_a_recording_of_another_tenant_does_not_exist(settings: Settings) -> None:
    async with with_keys(settings) as (gateway, http, (alice, bob)):
        assert (await gateway.answer(await gateway.connect(head(99_000_000))))[0] == 401
        hers = (await http.post("/recordings", content=DATA, headers=bearer(alice))).json()
        place = f"/recordings/{hers['recording_id']}"
        for method, path in (("GET", ""), ("GET", "/audio"), ("GET", "/peaks"), ("DELETE", "")):
            answer = await http.request(method, f"{place}{path}", headers=bearer(bob))
            assert (answer.status_code, answer.json()["type"]) == (404, "/problems/unknown-recording")
            assert (await http.request(method, f"{place}{path}")).status_code == 401
        assert (await http.get("/recordings", headers=bearer(bob))).json()["recordings"] == []
        his = (await http.post("/recordings", content=DATA, headers=bearer(bob))).json()
        assert his["recording_id"] != hers["recording_id"]
        assert (await http.delete(f"/recordings/{his['recording_id']}", headers=bearer(bob))).status_code == 204
        assert (await http.get(f"{place}/audio", headers=bearer(alice))).status_code == 200


async def test_recordings_count_against_the_limits_of_a_key(settings: Settings) -> None:
    """As songs do: the same file again does not. A file that was decoded does, although it is refused."""
    async with with_keys(settings, "songs_per_minute = 3\nsongs_at_once = 2") as (gateway, http, (alice, _)):

        async def upload(data: bytes) -> tuple[int, str]:
            answer = await http.post("/recordings", content=data, headers=bearer(alice))
            return answer.status_code, answer.json().get("detail", "")

        assert (await upload(b"no audio"))[0] == 415
        assert (await upload(DATA))[0] == 202
        assert (await upload(DATA))[0] == 202
        song = await http.post("/generate", json={"lyrics": "la"}, headers=bearer(alice))
        assert song.status_code == 202
        sent = head(99_000_000, f"Authorization: Bearer {alice}")
        status, lines, body = await gateway.answer(await gateway.connect(sent))  # before a byte of it was read
        assert (status, body["detail"]) == (429, "this key allows 3 songs a minute")
        assert "retry-after" in lines
        gateway.parts.quotas._usage.clear()  # a minute later
        status, words = await upload(file_of("flac", music(1.3)))
        assert status == 429
        assert words.startswith("this key allows 2 songs and recordings waiting or running at once")
        assert os.listdir(gateway.scratch) == []


async def test_recordings_do_not_fill_the_queue_that_songs_need(settings: Settings) -> None:
    """How many wait is known to the second."""
    async with (
        in_process(replace(settings, queue_limit=2)) as found,
        httpx.AsyncClient(base_url=found[2], trust_env=False) as http,
    ):
        lengths = iter(range(11, 99))

        async def refused() -> bool:
            answer = await http.post("/recordings", content=file_of("flac", music(next(lengths) / 10, 8000), 8000))
            assert answer.status_code == 202 or answer.json()["type"] == "/problems/queue-full"
            return answer.status_code == 429

        await eventually(refused, "recordings are taken without end")
        assert (await http.post("/generate", json={"lyrics": "la"})).status_code == 202
