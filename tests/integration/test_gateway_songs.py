"""One song: what was asked for, and its removal; and how long one may be."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from functools import partial

import pytest

from deploy.local.servers.embedded import NatsServer, S3Server
from shared.nats.subjects import TENANT, submit_subject
from shared.schema.request import DEFAULT_DURATION_MS
from tests.integration.gateway_fixtures import SONG, TINY, House, eventually, fresh_settings, open_house

ASKED = SONG | {"seed": 2**53 - 1, "title": "Lied", "temperature": 0.5, "cfg_scale": 2.0, "topk": 7, "format": "wav"}


@pytest.fixture(scope="module")
async def house(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("gateway-songs")
    async with open_house(await fresh_settings(nats_server, s3_server, folder), folder) as house:
        yield house


async def listed(house: House) -> dict[str, dict[str, object]]:
    songs = (await house.http.get("/generate", params={"limit": "100"})).json()["songs"]
    return {song["job_id"]: song for song in songs}


async def test_a_song_tells_what_was_asked_for(house: House) -> None:
    job_id = await house.submit(**ASKED, priority="high")
    song = (await house.http.get(f"/generate/{job_id}")).json()
    assert song["request"] == ASKED | {"priority": "high"}
    assert {**song, "request": None} == {**(await house.http.get(f"/generate/{job_id}/status")).json(), "request": None}
    assert (await listed(house))[job_id] == song
    assert (await house.http.head(f"/generate/{job_id}")).status_code == 200
    # What was filled in is told too: the same request makes the same song.
    bare = await house.http.post("/generate", json={"lyrics": "la"})
    request = (await house.http.get(f"/generate/{bare.json()['job_id']}")).json()["request"]
    assert (request["tags"], request["title"], request["format"], request["priority"]) == ("", None, "flac", "normal")
    assert request["seed"] >= 0
    fits = (await house.http.post("/api/fit", json={"lyrics": "la"})).json()["longest_ms"]
    assert request["max_duration_ms"] == min(fits, DEFAULT_DURATION_MS)
    assert (await house.http.post("/generate", json=request)).status_code == 202


async def test_tags_are_tidied_and_kept_as_they_were_sent_too(house: House) -> None:
    sent, tidy = "pop, piano\nPop, , english ", "pop,piano,english"
    key = {"Idempotency-Key": str(uuid.uuid4())}
    over_http = (await house.http.post("/generate", json=SONG | {"tags": sent}, headers=key)).json()["job_id"]
    answer = await house.nc.request(submit_subject(TENANT), json.dumps(SONG | {"tags": sent}).encode(), timeout=10)
    for job_id in (over_http, json.loads(answer.data)["job_id"]):
        job = await house.job(job_id)
        assert (job.request.tags, job.tags_sent) == (tidy, sent)
        assert (await house.http.get(f"/generate/{job_id}")).json()["request"]["tags"] == tidy
    assert (await house.job(await house.submit(tags=tidy))).tags_sent is None
    # Its form is no reason to make a song twice, nor to measure it otherwise.
    again = await house.http.post("/generate", json=SONG | {"tags": sent}, headers=key)
    assert (again.status_code, again.json()["job_id"]) == (202, over_http)
    fits = [(await house.http.post("/api/fit", json={"lyrics": "la", "tags": tags})).json() for tags in (sent, tidy)]
    assert fits[0] == fits[1]


async def test_an_ended_song_is_removed_with_all_that_belongs_to_it(house: House) -> None:
    async with open_house(house.settings, house.log.parent) as second:
        job_id = await house.submit()
        refused = await house.http.delete(f"/generate/{job_id}", params={"forget": "true"})
        assert (refused.status_code, refused.json()["type"]) == (409, "/problems/conflict")
        await house.complete(job_id)
        await house.store.put(f"tokens/{job_id}/1.safetensors", b"x")
        for one in (house, second):
            assert job_id in await listed(one)
        assert (await house.http.delete(f"/generate/{job_id}")).status_code == 409  # it cannot be cancelled
        answer = await house.http.delete(f"/generate/{job_id}", params={"forget": "true"})
        assert (answer.status_code, answer.json()) == (200, {"job_id": job_id, "status": "completed"})
        assert [item.key for item in await house.store.list("") if job_id in item.key] == []
        for one in (house, second):
            assert job_id not in await listed(one)
            for path in ("", "/status", "/result"):
                assert (await one.http.get(f"/generate/{job_id}{path}")).status_code == 404
        again = await house.http.delete(f"/generate/{job_id}", params={"forget": "true"})
        assert again.status_code == 404


async def test_failed_and_cancelled_songs_are_removed_too(house: House) -> None:
    failed, cancelled = await house.submit(), await house.submit()
    await house.become(failed, "failed", error="no")
    await house.http.delete(f"/generate/{cancelled}")
    for job_id, status in ((failed, "failed"), (cancelled, "cancelled")):
        answer = await house.http.delete(f"/generate/{job_id}", params={"forget": "true"})
        assert answer.json() == {"job_id": job_id, "status": status}
        assert (await house.http.get(f"/generate/{job_id}")).status_code == 404


@pytest.mark.parametrize("value", ["1", "True", ""])
async def test_forget_is_true_or_false(house: House, value: str) -> None:
    job_id = await house.submit()
    answer = await house.http.delete(f"/generate/{job_id}", params={"forget": value})
    assert (answer.status_code, answer.json()["field"]) == (422, "forget")
    assert (await house.job(job_id)).status == "queued"
    answer = await house.http.delete(f"/generate/{job_id}", params={"forget": "false"})
    assert answer.json()["status"] == "cancelled"


async def test_a_late_repetition_does_not_bring_a_removed_song_back(house: House) -> None:
    ask = partial(house.http.post, "/generate", json=SONG, headers={"Idempotency-Key": str(uuid.uuid4())})
    job_id = (await ask()).json()["job_id"]
    await house.complete(job_id)
    await house.http.delete(f"/generate/{job_id}", params={"forget": "true"})
    answer = await ask()
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
    assert "new key" in answer.json()["detail"]
    assert await house.jobs.get(job_id) is None
    assert job_id not in await listed(house)


async def test_what_fits_beside_a_text(house: House) -> None:
    async with open_house(house.settings, house.log.parent, model_path=TINY) as tiny:
        await fits(tiny)


async def fits(house: House) -> None:
    async def fit(lyrics: str, **more: str) -> dict[str, int]:
        answer = await house.http.post("/api/fit", json={"lyrics": lyrics} | more)
        assert answer.status_code == 200, answer.text
        found: dict[str, int] = answer.json()
        return found

    blank, short, long = await fit(""), await fit("la la la", tags="pop"), await fit("la la la " * 20, tags="pop")
    assert 0 < blank["prompt_tokens"] < short["prompt_tokens"] < long["prompt_tokens"]
    assert short["longest_ms"] - long["longest_ms"] == 80 * (long["prompt_tokens"] - short["prompt_tokens"])
    song = {"lyrics": "la la la " * 20, "tags": "pop"}
    longest = await house.http.post("/generate", json=song | {"max_duration_ms": long["longest_ms"]})
    assert longest.status_code == 202
    longer = await house.http.post("/generate", json=song | {"max_duration_ms": long["longest_ms"] + 80})
    assert (longer.status_code, longer.json()["field"]) == (422, "max_duration_ms")
    assert (await fit("la " * 19_000))["longest_ms"] == 0


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "lyrics: is required"),
        ({"lyrics": 1}, 422, "lyrics: must be text, not a whole number"),
        ({"lyrics": "a", "seed": 1}, 422, "seed: is not a field; there are lyrics, tags"),
        ({"lyrics": "a\u0000"}, 422, "control character U+0000"),
        ({"lyrics": "a" * 60_001}, 422, "at most 60000 characters"),
        ({"lyrics": "a" * 300_000}, 413, "256 KiB"),
        ([], 422, "must be an object"),
    ],
)
async def test_text_that_cannot_be_measured(house: House, body: object, status: int, words: str) -> None:
    answer = await house.http.post("/api/fit", json=body)
    assert answer.status_code == status
    assert words in answer.json()["detail"]


async def test_a_form_of_another_site_is_refused(house: House) -> None:
    answer = await house.http.post("/api/fit", content="{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


async def test_objects_of_a_removed_song_that_come_late_are_swept(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("gateway-swept")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with open_house(settings, folder, sweep_seconds=1.0) as house:
        job_id = await house.submit()
        await house.complete(job_id)
        await house.http.delete(f"/generate/{job_id}", params={"forget": "true"})
        await house.store.put(f"audio/{job_id}/9.flac", b"x")  # by a worker that had lost its lease

        async def gone() -> bool:
            return not await house.store.list(f"audio/{job_id}/")

        await eventually(gone, "it is still there")


async def test_texts_are_measured_a_few_at_a_time_and_songs_are_taken_meanwhile(house: House) -> None:
    """A client that asks for too many has to wait, before the tokenizer has anything to do with them."""
    async with open_house(house.settings, house.log.parent) as second:
        text = {"lyrics": "la li lo lu " * 4_000}
        song = asyncio.create_task(second.submit())
        found = await asyncio.gather(*(second.http.post("/api/fit", json=text) for _ in range(40)))
        await song
        assert {answer.status_code for answer in found} == {200, 429}
        assert sum(answer.status_code == 429 for answer in found) >= 20
        for answer in found:
            if answer.status_code == 429:
                assert answer.json()["type"] == "/problems/too-many-requests"
                assert int(answer.headers["retry-after"]) >= 1
