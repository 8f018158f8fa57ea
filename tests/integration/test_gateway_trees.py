"""Songs and those that go on from them: what a song names, the tree, the list, and what is left of what was removed."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.songs import index, tree
from shared.nats.subjects import TENANT
from shared.schema.base import CONTINUED_SCHEMA
from shared.schema.job import Job, Parent
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, in_process, running_gateway


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-trees")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


async def branch(gateway: RunningGateway, parent: str, at_ms: int, **values: Any) -> str:
    """Have a song made that goes on from another one; returns its id."""
    return (await gateway.made(100, continue_from={"job_id": parent, "at_ms": at_ms}, max_duration_ms=None, **values))[
        0
    ]


async def song(gateway: RunningGateway, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = (await gateway.http.get(f"/generate/{job_id}")).json()
    return found


async def tree_of(gateway: RunningGateway, job_id: str) -> dict[str, Any]:
    answer = await gateway.http.get(f"/generate/{job_id}/tree")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def shape(found: dict[str, Any]) -> list[tuple[str, str | None, int | None]]:
    return [(each["job_id"], each.get("parent"), each.get("at_ms")) for each in found["songs"]]


async def remove(gateway: RunningGateway, job_id: str) -> None:
    assert (await gateway.http.delete(f"/generate/{job_id}", params={"forget": "true"})).status_code == 200


async def test_a_song_names_what_it_goes_on_from_and_what_goes_on_from_it(gateway: RunningGateway) -> None:
    root, _ = await gateway.made(100)
    alone = await song(gateway, root)
    assert not {"parent", "children"} & alone.keys()
    assert not {"continue_from", "min_new_ms"} & alone["request"].keys()
    first = await branch(gateway, root, 4_079)
    second = await branch(gateway, root, 800)
    assert (await song(gateway, root))["children"] == [first, second]
    found = await song(gateway, first)
    assert found["parent"] == {"job_id": root, "at_ms": 4_000, "exists": True}
    assert "children" not in found
    listed = (await gateway.http.get("/generate", params={"limit": 100})).json()["songs"]
    assert [each for each in listed if each["job_id"] in (root, first)] == [found, await song(gateway, root)]
    assert "parent" not in (await gateway.http.get(f"/generate/{first}/status")).json()


async def test_the_request_that_is_shown_makes_the_same_song_again(gateway: RunningGateway) -> None:
    root, _ = await gateway.made(100)
    child = await branch(gateway, root, 4_079, min_new_ms=1_001, seed=5)
    request = (await song(gateway, child))["request"]
    assert (request["continue_from"], request["min_new_ms"]) == ({"job_id": root, "at_ms": 4_000}, 1_040)
    again = await gateway.http.post("/generate", json=request)
    one, other = await gateway.job(child), await gateway.job(again.json()["job_id"])
    assert (other.request, other.parent) == (one.request, one.parent)


async def test_a_tree_has_all_songs_that_go_back_to_the_same_one(gateway: RunningGateway) -> None:
    root, _ = await gateway.made(100, title="Lied")
    left, right = await branch(gateway, root, 4_000), await branch(gateway, root, 800)
    leaf = await branch(gateway, left, 5_600)
    await gateway.made(100)  # of no tree
    expected = [(root, None, None), (left, root, 4_000), (right, root, 800), (leaf, left, 5_600)]
    for job_id in (root, left, right, leaf):
        found = await tree_of(gateway, job_id)
        assert found["root"] == root
        assert sorted(map(str, shape(found))) == sorted(map(str, expected))
    names = [each["job_id"] for each in (await tree_of(gateway, leaf))["songs"]]
    assert names.index(root) < names.index(left) < names.index(leaf)
    top = (await tree_of(gateway, root))["songs"][0]
    assert (top["title"], top["status"], top["duration"]) == ("Lied", "completed", 4.0)
    assert (await gateway.http.head(f"/generate/{root}/tree")).status_code == 200
    assert (await gateway.http.get(f"/generate/{uuid.uuid4()}/tree")).json()["type"] == "/problems/unknown-job"


async def test_a_parent_that_was_removed_is_shown_and_leaves_its_children_whole(gateway: RunningGateway) -> None:
    root, _ = await gateway.made(100)
    left, right = await branch(gateway, root, 4_000), await branch(gateway, root, 800)
    leaf = await branch(gateway, left, 5_600)
    await remove(gateway, root)
    assert (await song(gateway, left))["parent"] == {"job_id": root, "at_ms": 4_000, "exists": False}
    assert (await song(gateway, left))["children"] == [leaf]
    found = await tree_of(gateway, leaf)
    assert found["root"] == root
    assert {each[0] for each in shape(found)} == {left, right, leaf}
    assert (await gateway.http.get(f"/generate/{root}/tree")).status_code == 404
    listed = (await gateway.http.get("/generate", params={"parent": root})).json()["songs"]
    assert [each["job_id"] for each in listed] == [right, left]
    assert (await gateway.http.get(f"/generate/{left}/result")).status_code == 200
    await branch(gateway, left, 800)  # it can still be gone on from
    await remove(gateway, left)
    assert {each[0] for each in shape(await tree_of(gateway, right))} == {right}
    assert (await tree_of(gateway, leaf))["root"] == left


async def test_the_list_shows_the_songs_that_go_on_from_one(gateway: RunningGateway) -> None:
    root, _ = await gateway.made(100)
    ids = [await branch(gateway, root, 800) for _ in range(3)]
    await branch(gateway, ids[0], 800)
    waiting = await gateway.submit(continue_from={"job_id": root, "at_ms": 800}, max_duration_ms=None)

    async def page(**asked: Any) -> tuple[list[str], str | None]:
        body = (await gateway.http.get("/generate", params={"parent": root, **asked})).json()
        return [each["job_id"] for each in body["songs"]], body["next"]

    assert await page() == ([waiting, *ids[::-1]], None)
    first, cursor = await page(limit=3)
    assert first == [waiting, ids[2], ids[1]]
    assert await page(limit=3, cursor=cursor) == ([ids[0]], None)
    assert await page(status="queued") == ([waiting], None)
    await remove(gateway, ids[1])
    assert await page(status="completed") == ([ids[2], ids[0]], None)
    assert (await gateway.http.get("/generate", params={"parent": str(uuid.uuid4())})).json()["songs"] == []
    for wrong in ("", "*", "a.b", "x" * 65):
        answer = await gateway.http.get("/generate", params={"parent": wrong})
        assert (answer.status_code, answer.json()["field"]) == (422, "parent")


# --- with streams of their own: the gateway above has none from here on


def record(job_id: str, parent: Parent | None, created: float) -> Job:
    job = Job(job_id=job_id, tenant=TENANT, request=GenerateRequest(lyrics="la", seed=1), created_at=created)
    return job if parent is None else msgspec.structs.replace(job, schema=CONTINUED_SCHEMA, parent=parent)


async def test_trees_of_records_as_nothing_here_writes_them(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with in_process(settings) as (gateway, _, base), httpx.AsyncClient(base_url=base, trust_env=False) as client:

        async def ids(job_id: str) -> tuple[str, list[str], int]:
            found = (await client.get(f"/generate/{job_id}/tree")).json()
            return found["root"], [each["job_id"] for each in found["songs"]], found.get("left_out", 0)

        for number, (job_id, origin) in enumerate([("a", "c"), ("b", "a"), ("c", "b")]):  # a ring
            await gateway.jobs.create(record(job_id, Parent(job_id=origin, frames=1, least_frames=1), number))
        root, songs, _ = await ids("a")
        assert (root, sorted(songs)) == ("b", ["a", "b", "c"])
        taken = Parent(recording_id="demo", frames=5, least_frames=9)
        await gateway.jobs.create(record("sung", taken, 10.0))
        await gateway.jobs.create(record("sung-2", taken, 11.0))
        assert await ids("sung-2") == ("demo", ["sung", "sung-2"], 0)
        shown = (await client.get("/generate/sung")).json()
        assert shown["parent"] == {"recording_id": "demo", "at_ms": 400, "exists": False}
        assert shown["request"]["continue_from"] == {"recording_id": "demo", "at_ms": 400}
        # Another tenant's songs under the same id are no children.
        await gateway.jobs.create(record("d", None, 20.0))
        parent = Parent(job_id="d", frames=1, least_frames=1)
        await gateway.jobs.create(msgspec.structs.replace(record("e", parent, 21.0), tenant="alice"))
        assert await ids("d") == ("d", ["d"], 0)
        # A chain that is longer than what is shown: the song itself is.
        for number in range(1, 9):
            parent = Parent(job_id=f"d-{number - 1}" if number > 1 else "d", frames=1, least_frames=1)
            await gateway.jobs.create(record(f"d-{number}", parent, 30.0 + number))
        await gateway.jobs.create(record("aside", Parent(job_id="d", frames=1, least_frames=1), 25.0))
        monkeypatch.setattr(tree, "MOST", 4)
        assert await ids("d-3") == ("d", ["d", "d-1", "d-2", "d-3"], 6)
        # The bucket does not say that a record has expired.
        assert (await client.get("/generate/d")).json()["children"] == ["aside", "d-1"]
        monkeypatch.setattr(index, "JOB_TTL", -1.0)
        assert "children" not in (await client.get("/generate/d")).json()
        assert (await client.get("/generate/d-1")).json()["parent"]["exists"] is False
