"""Songs that go on from another one: what is stored of that one, what is refused, and what a repeat finds."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from nats.js.errors import NotFoundError

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.errors import ApiError
from services.gateway.submission.idempotency import digest_of, song_of, songs_of
from services.gateway.submission.rollback import roll_back
from shared.nats.subjects import JOBS, TENANT, TOK, submit_subject, token_subject
from shared.schema.base import CONTINUED_SCHEMA, SCHEMA
from shared.schema.job import Job, Parent, TokenJob
from shared.schema.request import DEFAULT_DURATION_MS, DEFAULT_MIN_NEW_MS, ContinueFrom, GenerateRequest
from shared.settings import Settings
from shared.storage.keys import kept_tokens_key
from shared.storage.token_file import TokenMeta, pack, unpack
from tests.integration.gateway_fixtures import (
    SONG,
    TINY,
    RunningGateway,
    eventually,
    fresh_settings,
    in_process,
    running_gateway,
)

WORDS = {"lyrics": "[Verse]\nla la la", "tags": "pop,piano"}


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-continuing")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


@pytest.fixture
def key() -> str:
    return str(uuid.uuid4())


async def ask(
    gateway: RunningGateway, job_id: str, at_ms: int | None = None, key: str | None = None, **values: object
) -> httpx.Response:
    """Ask for a song that goes on from another one."""
    origin = {"job_id": job_id} | ({} if at_ms is None else {"at_ms": at_ms})
    headers = {"Idempotency-Key": key} if key else {}
    return await gateway.http.post("/generate", json=WORDS | {"continue_from": origin} | values, headers=headers)


async def taken(gateway: RunningGateway, *asked: Any, **values: Any) -> Job:
    """Ask for a song that goes on from another one; returns its record."""
    answer = await ask(gateway, *asked, **values)
    assert answer.status_code == 202, answer.text
    return await gateway.job(answer.json()["job_id"])


async def kept(gateway: RunningGateway, job_id: str) -> tuple[np.ndarray, TokenMeta]:
    """What is stored of the tokens that a song takes over."""
    return unpack(await gateway.store.get(kept_tokens_key(job_id)), job_id)


async def stored(gateway: RunningGateway) -> tuple[set[str], int, int]:
    """Keys of tokens, number of messages in the queue, number of records without delete markers."""
    records = 0
    info = await gateway.js.stream_info(f"KV_{JOBS}", subjects_filter=">")
    for subject in info.state.subjects or {}:
        records += bool((await gateway.js.get_msg(f"KV_{JOBS}", subject=subject)).data)
    keys = {item.key for item in await gateway.store.list("tokens/")}
    return keys, (await gateway.js.stream_info(TOK)).state.messages, records


async def test_a_song_begins_with_the_frames_of_another_one(gateway: RunningGateway) -> None:
    origin, codes = await gateway.made(700, seed=7)
    job = await taken(gateway, origin, 40_079, seed=9, title="Lied")
    assert job.schema == CONTINUED_SCHEMA
    assert job.parent == Parent(job_id=origin, frames=500, least_frames=625, seeds=(7,))  # 40 of 40.079 s
    assert (job.request.seed, job.request.title, job.request.continue_from) == (9, "Lied", None)
    assert job.request.min_new_ms == DEFAULT_MIN_NEW_MS
    fits = (await gateway.http.post("/api/fit", json=WORDS)).json()["longest_ms"]
    assert job.request.max_duration_ms == min(40_000 + DEFAULT_DURATION_MS, fits)
    found, meta = await kept(gateway, job.job_id)
    assert np.array_equal(found, codes[:, :500])
    assert (meta.model, meta.seed, meta.ended) == ("HeartMuLa-oss-3B", 7, False)
    assert [(window.window, window.frames, window.seed) for window in meta.earlier] == [(1, 500, 7)]
    message = await gateway.js.get_msg(TOK, subject=token_subject("normal", job.job_id))
    order = TokenJob(schema=CONTINUED_SCHEMA, job_id=job.job_id, tenant=TENANT)
    assert msgspec.json.decode(message.data or b"", type=TokenJob) == order


async def test_other_songs_are_stored_as_before(gateway: RunningGateway) -> None:
    job = await gateway.job(await gateway.submit())
    assert (job.schema, job.parent) == (SCHEMA, None)
    assert not await gateway.store.list(f"tokens/{job.job_id}/")
    message = await gateway.js.get_msg(TOK, subject=token_subject("normal", job.job_id))
    assert msgspec.json.decode(message.data or b"", type=TokenJob).schema == SCHEMA


@pytest.mark.parametrize(("at_ms", "frames"), [(None, 100), (80, 1), (159, 1), (7_999, 99), (8_000, 100), (8_079, 100)])
async def test_whole_frames_are_kept(gateway: RunningGateway, at_ms: int | None, frames: int) -> None:
    origin, codes = await gateway.made(100)
    job = await taken(gateway, origin, at_ms)
    assert job.parent is not None
    assert job.parent.frames == frames
    assert np.array_equal((await kept(gateway, job.job_id))[0], codes[:, :frames])


@pytest.mark.parametrize(
    ("values", "least"),
    [({}, 225), ({"min_new_ms": 0}, 100), ({"min_new_ms": 81}, 102), ({"max_duration_ms": 9_000}, 112)],
)
async def test_so_much_is_new_at_least_as_far_as_the_length_allows(
    gateway: RunningGateway, values: dict[str, int], least: int
) -> None:
    origin, _ = await gateway.made(100)
    job = await taken(gateway, origin, **values)
    assert job.parent is not None
    assert job.parent.least_frames == least


async def test_a_song_goes_on_from_one_that_goes_on_from_a_third(gateway: RunningGateway) -> None:
    """Each window of the codec keeps the seed of the song in which it was first whole."""
    first, codes = await gateway.made(1000, seed=3)
    second = await taken(gateway, first, 700 * 80, seed=4)  # two windows are whole
    assert second.parent is not None
    assert second.parent.seeds == (3, 3)
    old, meta = await kept(gateway, second.job_id)
    more = np.concatenate([old, codes[:, :400]], axis=1)
    path = f"tokens/{second.job_id}/9.safetensors"
    whole = TokenMeta(job_id=second.job_id, model="HeartMuLa-oss-3B", seed=4, earlier=meta.earlier)
    await gateway.store.put(path, pack(more, whole))
    await gateway.move_to(second.job_id, "generating", "decoding", tokens_key=path, frames=1100)
    await gateway.complete(second.job_id)
    third = await taken(gateway, second.job_id, 1050 * 80, seed=5)
    assert third.parent is not None
    assert third.parent.seeds == (3, 3, 4)
    found, meta = await kept(gateway, third.job_id)
    assert np.array_equal(found, more[:, :1050])
    assert [(window.window, window.frames, window.seed) for window in meta.earlier][-1] == (3, 1050, 4)
    back = await taken(gateway, second.job_id, 720 * 80)  # in the window in which the first two part
    _, meta = await kept(gateway, back.job_id)
    assert [(window.window, window.frames, window.seed) for window in meta.earlier] == [(2, 700, 3), (2, 720, 4)]


async def test_every_variant_has_what_it_takes_over(gateway: RunningGateway) -> None:
    origin, codes = await gateway.made(100)
    answer = await ask(gateway, origin, 4_000, variants=4, seed=1)
    ids = [each["job_id"] for each in answer.json()["variants"]]
    jobs = [await gateway.job(job_id) for job_id in ids]
    assert [(job.request.seed, job.variant, job.group) for job in jobs] == [(n, n, ids[0]) for n in (1, 2, 3, 4)]
    for job in jobs:
        assert job.parent == jobs[0].parent
        assert np.array_equal((await kept(gateway, job.job_id))[0], codes[:, :50])


# --- what is refused


def problem(answer: httpx.Response) -> tuple[int, str, str]:
    body = answer.json()
    return answer.status_code, body["type"].removeprefix("/problems/"), body.get("field", "")


@pytest.mark.parametrize(
    ("origin", "field", "words"),
    [
        ({}, "continue_from", "either a song, as job_id, or a recording"),
        ({"job_id": "a", "recording_id": "b"}, "continue_from", "either a song, as job_id, or a recording"),
        ({"job_id": "a", "at_ms": 79}, "continue_from.at_ms", "must be at least 80"),
        ({"job_id": "a", "at_ms": 1.5}, "continue_from.at_ms", "must be a whole number or null"),
        ({"job_id": 1}, "continue_from.job_id", "must be text or null"),
        ({"job_id": "a", "at": 5}, "continue_from.at", "is not a field; there are job_id, recording_id, at_ms"),
        ("a", "continue_from", "must be an object or null"),
    ],
)
async def test_what_names_no_song_is_refused_in_words(
    gateway: RunningGateway, origin: object, field: str, words: str
) -> None:
    for path in ("/generate", "/api/fit"):
        answer = await gateway.http.post(path, json=WORDS | {"continue_from": origin})
        assert problem(answer) == (422, "invalid-request", field)
        assert words in answer.json()["detail"]


async def test_a_least_new_part_goes_with_a_song_to_go_on_from(gateway: RunningGateway) -> None:
    answer = await gateway.http.post("/generate", json=WORDS | {"min_new_ms": 5})
    assert problem(answer) == (422, "invalid-request", "min_new_ms")
    assert (await gateway.http.post("/generate", json=WORDS | {"continue_from": None})).status_code == 202


async def test_a_song_that_cannot_be_gone_on_from_is_refused_and_leaves_nothing(gateway: RunningGateway) -> None:
    waiting, failed = await gateway.submit(), await gateway.submit()
    await gateway.move_to(failed, "failed", error="no")
    without = await gateway.submit()
    await gateway.complete(without)
    gone, _ = await gateway.made(100)
    await gateway.store.delete_one(f"tokens/{gone}/5.safetensors")
    damaged, _ = await gateway.made(100)
    await gateway.store.put(f"tokens/{damaged}/5.safetensors", b"damaged")
    newer = await gateway.job(await gateway.submit())
    data = msgspec.json.encode(msgspec.structs.replace(newer, schema=99))
    await gateway.js.publish(f"$KV.{JOBS}.{TENANT}.{newer.job_id}", data)
    before = await stored(gateway)
    field = "continue_from.job_id"
    for job_id, expected, words in (
        (str(uuid.uuid4()), (404, "unknown-job", field), "no song has this id"),
        ("*", (404, "unknown-job", field), "no song has this id"),
        (waiting, (409, "conflict", field), "is queued"),
        (failed, (409, "conflict", field), "is failed"),
        (newer.job_id, (409, "conflict", field), "newer version"),
        (without, (410, "no-tokens", field), "no longer kept"),
        (gone, (410, "no-tokens", field), "no longer kept"),
        (damaged, (410, "no-tokens", field), "no longer kept"),
    ):
        answer = await ask(gateway, job_id, variants=2)
        assert problem(answer) == expected
        assert words in answer.json()["detail"]
        if job_id != damaged:  # its tokens are not read
            fit = await gateway.http.post("/api/fit", json=WORDS | {"continue_from": {"job_id": job_id}})
            assert problem(fit) == expected
    assert await stored(gateway) == before


async def test_a_recording_that_does_not_exist_is_refused(gateway: RunningGateway) -> None:
    for path in ("/generate", "/api/fit"):
        answer = await gateway.http.post(path, json=WORDS | {"continue_from": {"recording_id": "abc"}})
        assert problem(answer) == (404, "unknown-recording", "continue_from.recording_id")


async def test_the_latest_moment_that_leaves_room_is_named(gateway: RunningGateway) -> None:
    async with running_gateway(gateway.settings, gateway.log.parent, model_path=TINY) as tiny:  # 256 positions
        origin, _ = await tiny.made(255)
        text = await tiny.http.post("/api/fit", json=WORDS | {"continue_from": {"job_id": origin, "at_ms": 12_399}})
        fits = text.json()
        latest = fits["latest_at_ms"]
        assert (fits["kept_ms"], latest) == (12_320, fits["longest_ms"] - 80)
        assert fits["longest_ms"] == 80 * (256 - fits["prompt_tokens"])
        refused = await ask(tiny, origin, latest + 80)
        assert problem(refused) == (422, "invalid-request", "continue_from.at_ms")
        assert f"keep {latest} ms at most" in refused.json()["detail"]
        job = await taken(tiny, origin, latest + 79)
        assert job.parent is not None
        assert (job.parent.frames * 80, job.request.max_duration_ms) == (latest, fits["longest_ms"])
        assert job.parent.least_frames == job.parent.frames + 1
        short, _ = await tiny.made(10)
        text = await tiny.http.post("/api/fit", json=WORDS | {"continue_from": {"job_id": short}})
        assert (text.json()["kept_ms"], text.json()["latest_at_ms"]) == (800, 800)


async def test_a_length_that_leaves_nothing_new_is_refused(gateway: RunningGateway) -> None:
    origin, _ = await gateway.made(100)
    refused = await ask(gateway, origin, max_duration_ms=8_079)
    assert problem(refused) == (422, "invalid-request", "max_duration_ms")
    assert "ask for 8080 ms at least, or keep 7920 ms at most" in refused.json()["detail"]
    assert (await ask(gateway, origin, max_duration_ms=8_080)).status_code == 202
    assert (await ask(gateway, origin, 7_920, max_duration_ms=8_079)).status_code == 202


async def test_nats_clients_go_on_from_a_song_too(gateway: RunningGateway, key: str) -> None:
    origin, codes = await gateway.made(100)

    async def submit(asked: object) -> dict[str, Any]:
        data = json.dumps(WORDS | {"continue_from": asked}).encode()
        found: dict[str, Any] = json.loads((await gateway.nc.request(submit_subject(TENANT), data, timeout=10)).data)
        return found

    answer = await submit({"job_id": origin, "at_ms": 800})
    assert np.array_equal((await kept(gateway, answer["job_id"]))[0], codes[:, :10])
    errors = [
        (await submit({"job_id": await gateway.submit()}), 409, 20007),
        (await submit({"job_id": "none"}), 404, 20010),
        (await submit({"recording_id": "none"}), 404, 20012),
    ]
    await gateway.store.delete_one(f"tokens/{origin}/5.safetensors")
    for found, status, code in [*errors, (await submit({"job_id": origin}), 410, 20011)]:
        assert (found["error"]["code"], found["error"]["err_code"]) == (status, code)


# --- repeats, rollbacks, crashes


async def test_a_repeat_is_answered_although_the_other_song_is_gone(gateway: RunningGateway, key: str) -> None:
    origin, codes = await gateway.made(100)
    first = await ask(gateway, origin, 800, key)
    before = await stored(gateway)
    assert (await ask(gateway, origin, 800, key)).json() == first.json()
    assert await stored(gateway) == before
    for other in (801, 80, None):
        assert problem(await ask(gateway, origin, other, key))[1] == "idempotency-mismatch"
    assert problem(await ask(gateway, origin, 800, key, min_new_ms=80))[1] == "idempotency-mismatch"
    await gateway.http.delete(f"/generate/{origin}", params={"forget": "true"})
    assert (await ask(gateway, origin, 800, key)).json() == first.json()
    assert np.array_equal((await kept(gateway, first.json()["job_id"]))[0], codes[:, :10])
    assert problem(await ask(gateway, origin, 800))[1] == "unknown-job"


async def test_many_at_once_make_one_group_with_what_it_takes_over(gateway: RunningGateway) -> None:
    origin, codes = await gateway.made(100)
    for _ in range(5):
        key = str(uuid.uuid4())
        answers = await asyncio.gather(*(ask(gateway, origin, 800, key, variants=2) for _ in range(8)))
        groups = {tuple(each["job_id"] for each in answer.json()["variants"]) for answer in answers}
        assert groups == {tuple(songs_of(key, 2))}
        for job_id in songs_of(key, 2):
            assert np.array_equal((await kept(gateway, job_id))[0], codes[:, :10])


async def test_what_a_crash_left_of_a_group_is_completed_by_the_repeat(gateway: RunningGateway, key: str) -> None:
    origin, codes = await gateway.made(100)
    values: dict[str, Any] = WORDS | {"variants": 2, "continue_from": {"job_id": origin, "at_ms": 4_000}}
    asked, names = msgspec.convert(values, GenerateRequest), songs_of(key, 2)
    left = Job(
        schema=CONTINUED_SCHEMA,
        job_id=names[1],
        tenant=TENANT,
        request=msgspec.convert(WORDS | {"seed": 8, "max_duration_ms": 20_000}, GenerateRequest),
        created_at=1.0,
        group=names[0],
        variant=2,
        digest=digest_of(asked),
        parent=Parent(job_id=origin, frames=50, least_frames=175),
    )
    await gateway.jobs.create(left)
    answer = await ask(gateway, origin, 4_000, key, variants=2)
    assert [each["job_id"] for each in answer.json()["variants"]] == names
    job = await gateway.job(names[0])
    assert (job.request.seed, job.request.max_duration_ms, job.parent) == (7, 20_000, left.parent)
    assert np.array_equal((await kept(gateway, names[0]))[0], codes[:, :50])
    assert await gateway.job(names[1]) == left


async def test_a_removed_song_is_not_made_again_and_leaves_no_tokens(gateway: RunningGateway, key: str) -> None:
    origin, _ = await gateway.made(100)
    job = await taken(gateway, origin, 800, key)
    await gateway.http.delete(f"/generate/{job.job_id}")
    await gateway.http.delete(f"/generate/{job.job_id}", params={"forget": "true"})
    assert problem(await ask(gateway, origin, 800, key))[1] == "conflict"

    async def gone() -> bool:
        return not await gateway.store.list(f"tokens/{job.job_id}/")

    await eventually(gone, "tokens of a removed song are there")


async def test_a_rollback_deletes_what_is_taken_over_unless_another_request_has_the_song(
    gateway: RunningGateway, key: str
) -> None:
    origin, _ = await gateway.made(100)
    job = await taken(gateway, origin, 800, key)  # with its message, so it was answered
    await roll_back(gateway.js, gateway.store, job)
    assert (await kept(gateway, job.job_id))[1].job_id == job.job_id
    await gateway.js.purge_stream(TOK, subject=token_subject("normal", job.job_id))
    await roll_back(gateway.js, gateway.store, job)
    assert await gateway.jobs.get(job.job_id) is None
    assert not await gateway.store.list(f"tokens/{job.job_id}/")
    without_key = await taken(gateway, origin, 800)
    await roll_back(gateway.js, gateway.store, without_key)
    assert not await gateway.store.list(f"tokens/{without_key.job_id}/")
    with pytest.raises(NotFoundError):
        await gateway.js.get_msg(TOK, subject=token_subject("normal", without_key.job_id))


# --- with streams of their own: the gateway above has none from here on


@pytest.mark.parametrize("with_key", [False, True])
async def test_nothing_is_left_of_a_group_for_which_the_queue_has_no_room(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory, key: str, with_key: bool
) -> None:
    folder = tmp_path_factory.mktemp("continuing-room")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with running_gateway(settings, folder, queue_limit=3) as gateway:
        origin, _ = await gateway.made(100)  # its message is still there
        before = await stored(gateway)
        used = key if with_key else None
        refused = await ask(gateway, origin, 800, used, variants=3)
        assert problem(refused)[1] == "queue-full"
        assert await stored(gateway) == before
        await gateway.js.purge_stream(TOK)
        again = await ask(gateway, origin, 800, used, variants=3)  # nothing is in the way later
        assert again.status_code == 202
        for each in again.json()["variants"]:
            await kept(gateway, each["job_id"])


async def test_the_tokens_are_stored_before_the_record_that_needs_them(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    order: list[str] = []
    async with in_process(settings) as (gateway, _, base), httpx.AsyncClient(base_url=base, trust_env=False) as client:
        parent = Job(
            job_id="origin",
            tenant=TENANT,
            request=GenerateRequest(lyrics="la", seed=1),
            created_at=1.0,
            status="completed",
            tokens_key="tokens/origin/1.safetensors",
            frames=10,
        )
        await gateway.jobs.create(parent)
        data = pack(np.zeros((8, 10), np.int16), TokenMeta(job_id="origin", model="m", seed=1))
        await gateway.store.put("tokens/origin/1.safetensors", data)
        put = gateway.store.put

        async def observed(name: str, *more: Any) -> None:
            if name == kept_tokens_key(song_of(key)):
                assert await gateway.jobs.get(song_of(key)) is None
                order.append(name)
            await put(name, *more)

        monkeypatch.setattr(gateway.store, "put", observed)
        asked = SONG | {"continue_from": {"job_id": "origin"}}
        answer = await client.post("/generate", json=asked, headers={"Idempotency-Key": key})
        assert answer.status_code == 202
        assert order == [kept_tokens_key(answer.json()["job_id"])]
        # The song of another tenant does not exist.
        with pytest.raises(ApiError, match="no song has this id"):
            await gateway.continuations.find("alice", ContinueFrom(job_id="origin"))
