"""Variants: several songs from one request, all of them or none, and the same songs for the same key."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.submission.idempotency import digest_of, songs_of
from shared.nats.streams import bootstrap, streams
from shared.nats.subjects import JOBS, TENANT, TOK, submit_subject
from shared.schema.job import Job
from shared.schema.request import MAX_SEED, GenerateRequest
from tests.integration.gateway_fixtures import SONG, RunningGateway, eventually, fresh_settings, running_gateway


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-variants")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


@pytest.fixture
def key() -> str:
    return str(uuid.uuid4())


async def post(gateway: RunningGateway, key: str | None = None, **values: object) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return await gateway.http.post("/generate", json=SONG | values, headers=headers)


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 202, answer.text
    return [each["job_id"] for each in answer.json()["variants"]]


async def kept(gateway: RunningGateway) -> tuple[int, int]:
    """Number of songs in the queue, and of records without delete markers."""
    records = 0
    info = await gateway.js.stream_info(f"KV_{JOBS}", subjects_filter=">")
    for subject in info.state.subjects or {}:
        records += bool((await gateway.js.get_msg(f"KV_{JOBS}", subject=subject)).data)
    return (await gateway.js.stream_info(TOK)).state.messages, records


async def test_variants_are_songs_of_their_own_with_seeds_in_a_row(gateway: RunningGateway) -> None:
    before = await kept(gateway)
    answer = await post(gateway, variants=3, seed=MAX_SEED - 1, title="Lied")
    body = answer.json()
    found = ids(answer)
    assert len(set(found)) == 3
    first = {name: value for name, value in body.items() if name != "variants"}
    assert body["variants"][0] == first
    assert answer.headers["location"] == f"/generate/{found[0]}/status"
    positions = [each["queue_position"] for each in body["variants"]]
    assert positions == list(range(positions[0], positions[0] + 3))
    songs = [(await gateway.http.get(f"/generate/{job_id}")).json() for job_id in found]
    assert [song["request"]["seed"] for song in songs] == [MAX_SEED - 1, MAX_SEED, 0]
    assert [(song["group"], song["variant"]) for song in songs] == [(found[0], number) for number in (1, 2, 3)]
    assert {song["title"] for song in songs} == {"Lied"}
    assert await kept(gateway) == (before[0] + 3, before[1] + 3)
    await gateway.http.delete(f"/generate/{found[1]}")  # one of them ends alone
    assert [(await gateway.job(job_id)).status for job_id in found] == ["queued", "cancelled", "queued"]


async def test_a_single_song_is_no_group(gateway: RunningGateway) -> None:
    answer = await post(gateway, variants=1)
    assert "variants" not in answer.json()
    song = (await gateway.http.get(f"/generate/{answer.json()['job_id']}")).json()
    assert "group" not in song
    assert "variant" not in song


async def test_seeds_follow_one_that_was_drawn(gateway: RunningGateway) -> None:
    seeds = [(await gateway.job(job_id)).request.seed or 0 for job_id in ids(await post(gateway, variants=4))]
    assert seeds == [(seeds[0] + number) % (MAX_SEED + 1) for number in range(4)]


@pytest.mark.parametrize(
    ("variants", "words"),
    [(0, "at least 1"), (5, "at most 4"), ("2", "a whole number"), (1.5, "a whole number"), (None, "a whole number")],
)
async def test_a_wrong_number_of_variants_is_refused_in_words(
    gateway: RunningGateway, variants: object, words: str
) -> None:
    answer = await post(gateway, variants=variants)
    assert (answer.status_code, answer.json()["field"]) == (422, "variants")
    assert words in answer.json()["detail"]


async def test_the_same_request_gets_the_same_group(gateway: RunningGateway, key: str) -> None:
    first = await post(gateway, key, variants=3)
    before = await kept(gateway)
    again = await post(gateway, key, variants=3)
    assert again.json() == first.json()
    found = ids(first)
    await gateway.move_to(found[1], "generating")
    assert [each["status"] for each in (await post(gateway, key, variants=3)).json()["variants"]] == [
        "queued",
        "generating",
        "queued",
    ]
    for other in ({"variants": 2}, {"variants": 4}, {}):
        assert (await post(gateway, key, **other)).json()["type"] == "/problems/idempotency-mismatch"
    assert await kept(gateway) == before


async def test_many_at_once_on_two_gateways_make_one_group(gateway: RunningGateway) -> None:
    async with running_gateway(gateway.settings, gateway.log.parent) as second:
        for _ in range(5):
            key, before = str(uuid.uuid4()), await kept(gateway)
            answers = await asyncio.gather(*(post(one, key, variants=4) for one in (gateway, second) * 4))
            assert len({tuple(ids(answer)) for answer in answers}) == 1
            assert await kept(gateway) == (before[0] + 4, before[1] + 4)
            seeds = [(await gateway.job(job_id)).request.seed or 0 for job_id in ids(answers[0])]
            assert seeds == [(seeds[0] + number) % (MAX_SEED + 1) for number in range(4)]


async def test_what_a_crash_left_of_a_group_is_completed_by_the_repeat(gateway: RunningGateway, key: str) -> None:
    asked = msgspec.convert(SONG | {"variants": 3}, GenerateRequest)
    names = songs_of(key, 3)
    left = Job(
        job_id=names[1],
        tenant=TENANT,
        request=msgspec.structs.replace(asked, seed=8, variants=1),
        created_at=1.0,
        group=names[0],
        variant=2,
        digest=digest_of(asked),
    )
    await gateway.jobs.create(left)
    before = await kept(gateway)
    assert ids(await post(gateway, key, variants=3)) == names
    jobs = [await gateway.job(job_id) for job_id in names]
    assert [job.request.seed for job in jobs] == [7, 8, 9]
    assert jobs[1] == left
    assert await kept(gateway) == (before[0] + 3, before[1] + 2)


async def test_a_group_of_which_a_song_was_removed_is_not_completed(gateway: RunningGateway, key: str) -> None:
    found = ids(await post(gateway, key, variants=2))
    await gateway.http.delete(f"/generate/{found[1]}")
    await gateway.http.delete(f"/generate/{found[1]}", params={"forget": "true"})
    before = await kept(gateway)
    answer = await post(gateway, key, variants=2)
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
    assert await kept(gateway) == before


async def test_nats_clients_ask_for_variants_too(gateway: RunningGateway, key: str) -> None:
    data = json.dumps(SONG | {"variants": 2}).encode()

    async def ask() -> dict[str, Any]:
        answer = await gateway.nc.request(submit_subject(TENANT), data, timeout=10, headers={"Nats-Msg-Id": key})
        found: dict[str, Any] = json.loads(answer.data)
        return found

    first, again = await ask(), await ask()
    assert first["stream"] == TOK
    assert [each["job_id"] for each in first["variants"]] == songs_of(key, 2)
    assert first["job_id"] == songs_of(key, 2)[0]
    assert again == first | {"duplicate": True}
    ack = await gateway.js.publish(submit_subject(TENANT), data, headers={"Nats-Msg-Id": key})
    assert ack.seq == first["seq"]


# --- with streams of their own: the gateway above has none from here on


@pytest.mark.parametrize("with_key", [False, True])
async def test_a_group_is_refused_as_a_whole_when_the_queue_has_no_room_for_all(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory, key: str, with_key: bool
) -> None:
    folder = tmp_path_factory.mktemp("variants-room")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with running_gateway(settings, folder, queue_limit=3) as gateway:
        waiting = await gateway.submit()
        used = key if with_key else None
        refused = await post(gateway, used, variants=3)
        assert (refused.status_code, refused.json()["type"]) == (429, "/problems/queue-full")
        assert await kept(gateway) == (1, 1)
        assert [song["job_id"] for song in (await gateway.http.get("/generate")).json()["songs"]] == [waiting]
        assert len(ids(await post(gateway, variants=2))) == 2
        for song in (await gateway.http.get("/generate")).json()["songs"]:
            await gateway.http.delete(f"/generate/{song['job_id']}")
        assert len(ids(await post(gateway, used, variants=3))) == 3  # and nothing is in the way later
        assert (await kept(gateway))[0] == 3


async def test_the_queue_of_an_older_version_is_changed_to_accept_groups(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("variants-older")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with running_gateway(settings, folder) as gateway:
        await gateway.js.delete_stream(TOK)
        older = next(stream for stream in streams(settings.queue_limit) if stream.name == TOK)
        older.allow_atomic = None
        await gateway.js.add_stream(older)
        assert (await post(gateway, variants=2)).status_code == 503

        async def nothing() -> bool:
            return await kept(gateway) == (0, 0)

        await eventually(nothing, "something stayed behind")
        await bootstrap(gateway.js, settings)
        assert len(ids(await post(gateway, variants=2))) == 2
