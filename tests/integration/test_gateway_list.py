"""The list of songs."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from deploy.local.servers.embedded import NatsServer, S3Server
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, running_gateway


@pytest.fixture
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("list")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


async def page(gateway: RunningGateway, **asked: Any) -> tuple[list[str], str | None]:
    answer = await gateway.http.get("/generate", params=asked)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return [song["job_id"] for song in body["songs"]], body["next"]


async def test_pages_hold_every_song_once_while_songs_come_and_go(gateway: RunningGateway) -> None:
    assert await page(gateway) == ([], None)
    ids = [await gateway.submit() for _ in range(5)][::-1]
    assert await page(gateway) == (ids, None)
    assert await page(gateway, limit=5) == (ids, None)
    first, cursor = await page(gateway, limit=2)
    assert (first, cursor is not None) == (ids[:2], True)
    newer = await gateway.submit()
    await gateway.jobs.delete(await gateway.job(ids[1]))  # where the cursor stands
    await gateway.move_to(ids[3], "generating")  # written last, but no newer for it
    second, cursor = await page(gateway, limit=2, cursor=cursor)
    assert second == ids[2:4]
    assert await page(gateway, limit=2, cursor=cursor) == (ids[4:], None)
    assert await page(gateway) == ([newer, ids[0], *ids[2:]], None)
    await gateway.stop()
    await gateway.start()
    assert await page(gateway) == ([newer, ids[0], *ids[2:]], None)


async def test_songs_can_be_asked_for_by_status(gateway: RunningGateway) -> None:
    ids = [await gateway.submit() for _ in range(3)][::-1]
    await gateway.http.delete(f"/generate/{ids[1]}")
    assert await page(gateway, status="queued") == ([ids[0], ids[2]], None)
    assert await page(gateway, status="cancelled") == ([ids[1]], None)
    song = (await gateway.http.get("/generate", params={"status": "cancelled"})).json()["songs"]
    assert song == [(await gateway.http.get(f"/generate/{ids[1]}")).json()]


async def test_parameters_that_are_wrong_are_named(gateway: RunningGateway) -> None:
    wrong = [("limit", "0"), ("limit", "101"), ("limit", "x"), ("limit", ""), ("cursor", "x"), ("cursor", "é")]
    for name, value in [*wrong, ("cursor", "W10"), ("status", "done")]:
        answer = await gateway.http.get("/generate", params={name: value})
        assert (answer.status_code, answer.json()["field"]) == (422, name), (name, value)


async def test_pages_of_other_origins_are_let_in_nowhere_unless_named(gateway: RunningGateway) -> None:
    elsewhere = {"Origin": "https://songs.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        await gateway.http.options("/generate", headers=elsewhere),
        await gateway.http.get("/generate", headers=elsewhere),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control-")]
