"""Single songs: the request that a song shows, its removal, and how long it may be."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from functools import partial

import pytest
from nats.js.errors import NotFoundError

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.submission.instrumental import MARKS
from shared.jobs.queues import queue_windows
from shared.nats.subjects import DEC, DEC_CONSUMERS, JOBS, TENANT, decode_subject, job_subject, submit_subject
from shared.schema.request import DEFAULT_DURATION_MS
from tests.integration.gateway_fixtures import SONG, TINY, RunningGateway, eventually, fresh_settings, running_gateway

ASKED = SONG | {"seed": 2**53 - 1, "title": "Lied", "temperature": 0.5, "cfg_scale": 2.0, "topk": 7, "format": "wav"}


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-songs")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


async def listed(gateway: RunningGateway) -> dict[str, dict[str, object]]:
    songs = (await gateway.http.get("/generate", params={"limit": "100"})).json()["songs"]
    return {song["job_id"]: song for song in songs}


async def test_a_song_shows_its_request(gateway: RunningGateway) -> None:
    job_id = await gateway.submit(**ASKED, priority="high")
    song = (await gateway.http.get(f"/generate/{job_id}")).json()
    assert song["request"] == ASKED | {"priority": "high"}
    assert {**song, "request": None} == {
        **(await gateway.http.get(f"/generate/{job_id}/status")).json(),
        "request": None,
    }
    assert (await listed(gateway))[job_id] == song
    assert (await gateway.http.head(f"/generate/{job_id}")).status_code == 200
    # What was filled in is answered too: the same request makes the same song.
    bare = await gateway.http.post("/generate", json={"lyrics": "la"})
    request = (await gateway.http.get(f"/generate/{bare.json()['job_id']}")).json()["request"]
    assert (request["tags"], request["title"], request["format"], request["priority"]) == ("", None, "flac", "normal")
    assert request["seed"] >= 0
    fits = (await gateway.http.post("/api/fit", json={"lyrics": "la"})).json()["longest_ms"]
    assert request["max_duration_ms"] == min(fits, DEFAULT_DURATION_MS)
    assert (await gateway.http.post("/generate", json=request)).status_code == 202


async def test_an_instrumental_song_shows_that_it_is_one_and_what_the_model_reads(gateway: RunningGateway) -> None:
    asked = {"lyrics": "", "tags": "piano, calm", "instrumental": True}
    over_http = (await gateway.http.post("/generate", json=asked)).json()["job_id"]
    answer = await gateway.nc.request(submit_subject(TENANT), json.dumps(asked).encode(), timeout=10)
    for job_id in (over_http, json.loads(answer.data)["job_id"]):
        request = (await gateway.http.get(f"/generate/{job_id}")).json()["request"]
        assert request["instrumental"] is True
        assert (request["tags"], request["lyrics"]) == ("piano,calm,instrumental", MARKS)
        message = await gateway.js.get_msg(f"KV_{JOBS}", subject=job_subject(TENANT, job_id))
        record = json.loads(message.data or b"")
        assert record["instrumental"] is True
        assert "instrumental" not in record["request"], "versions before know no such field there, and read no other"
    assert (await gateway.http.post("/generate", json=request)).status_code == 202
    sung = await gateway.http.post("/generate", json=asked | {"lyrics": "[Verse]\nla la"})
    assert (sung.status_code, sung.json()["field"]) == (422, "lyrics")
    fits = [
        (await gateway.http.post("/api/fit", json=text)).json()
        for text in (asked, {"lyrics": MARKS, "tags": "piano,calm,instrumental"})
    ]
    assert fits[0] == fits[1]


async def test_tags_are_tidied_and_kept_as_they_were_sent_too(gateway: RunningGateway) -> None:
    sent, tidy = "pop, piano\nPop, , english ", "pop,piano,english"
    key = {"Idempotency-Key": str(uuid.uuid4())}
    over_http = (await gateway.http.post("/generate", json=SONG | {"tags": sent}, headers=key)).json()["job_id"]
    answer = await gateway.nc.request(submit_subject(TENANT), json.dumps(SONG | {"tags": sent}).encode(), timeout=10)
    for job_id in (over_http, json.loads(answer.data)["job_id"]):
        job = await gateway.job(job_id)
        assert (job.request.tags, job.tags_sent) == (tidy, sent)
        assert (await gateway.http.get(f"/generate/{job_id}")).json()["request"]["tags"] == tidy
    assert (await gateway.job(await gateway.submit(tags=tidy))).tags_sent is None
    # Its form is no reason to make a song twice, nor to measure it otherwise.
    again = await gateway.http.post("/generate", json=SONG | {"tags": sent}, headers=key)
    assert (again.status_code, again.json()["job_id"]) == (202, over_http)
    fits = [(await gateway.http.post("/api/fit", json={"lyrics": "la", "tags": tags})).json() for tags in (sent, tidy)]
    assert fits[0] == fits[1]


async def test_an_ended_song_is_removed_with_all_that_belongs_to_it(gateway: RunningGateway) -> None:
    async with running_gateway(gateway.settings, gateway.log.parent) as second:
        job_id = await gateway.submit()
        refused = await gateway.http.delete(f"/generate/{job_id}", params={"forget": "true"})
        assert (refused.status_code, refused.json()["type"]) == (409, "/problems/conflict")
        await gateway.complete(job_id)
        await gateway.store.put(f"tokens/{job_id}/1.safetensors", b"x")
        for one in (gateway, second):
            assert job_id in await listed(one)
        assert (await gateway.http.delete(f"/generate/{job_id}")).status_code == 409  # it cannot be cancelled
        answer = await gateway.http.delete(f"/generate/{job_id}", params={"forget": "true"})
        assert (answer.status_code, answer.json()) == (200, {"job_id": job_id, "status": "completed"})
        assert [item.key for item in await gateway.store.list("") if job_id in item.key] == []
        for one in (gateway, second):
            assert job_id not in await listed(one)
            for path in ("", "/status", "/result"):
                assert (await one.http.get(f"/generate/{job_id}{path}")).status_code == 404
        again = await gateway.http.delete(f"/generate/{job_id}", params={"forget": "true"})
        assert again.status_code == 404


async def test_a_song_that_can_be_heard_is_cancelled_with_its_parts_and_both_messages(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    await gateway.move_to(job_id, "generating", tokens_key=f"tokens/{job_id}/3.safetensors", saved_frames=400)
    await gateway.decode_window(job_id)
    job = await gateway.job(job_id)
    for listened in (True, False):
        assert await queue_windows(gateway.nc, job, listened=listened) is not None
    assert (await gateway.http.delete(f"/generate/{job_id}")).status_code == 200
    for lane in DEC_CONSUMERS:
        with pytest.raises(NotFoundError):
            await gateway.js.get_msg(DEC, subject=decode_subject(job_id, lane))

    async def gone() -> bool:
        return not await gateway.store.list(f"audio/{job_id}/")

    await eventually(gone, "its parts are still there")
    state = (await gateway.http.get(f"/generate/{job_id}/status")).json()
    assert (state["status"], state["playable_seconds"]) == ("cancelled", 0)


async def test_failed_and_cancelled_songs_are_removed_too(gateway: RunningGateway) -> None:
    failed, cancelled = await gateway.submit(), await gateway.submit()
    await gateway.move_to(failed, "failed", error="no")
    await gateway.http.delete(f"/generate/{cancelled}")
    for job_id, status in ((failed, "failed"), (cancelled, "cancelled")):
        answer = await gateway.http.delete(f"/generate/{job_id}", params={"forget": "true"})
        assert answer.json() == {"job_id": job_id, "status": status}
        assert (await gateway.http.get(f"/generate/{job_id}")).status_code == 404


@pytest.mark.parametrize("value", ["1", "True", ""])
async def test_forget_is_true_or_false(gateway: RunningGateway, value: str) -> None:
    job_id = await gateway.submit()
    answer = await gateway.http.delete(f"/generate/{job_id}", params={"forget": value})
    assert (answer.status_code, answer.json()["field"]) == (422, "forget")
    assert (await gateway.job(job_id)).status == "queued"
    answer = await gateway.http.delete(f"/generate/{job_id}", params={"forget": "false"})
    assert answer.json()["status"] == "cancelled"


async def test_a_late_repetition_does_not_bring_a_removed_song_back(gateway: RunningGateway) -> None:
    ask = partial(gateway.http.post, "/generate", json=SONG, headers={"Idempotency-Key": str(uuid.uuid4())})
    job_id = (await ask()).json()["job_id"]
    await gateway.complete(job_id)
    await gateway.http.delete(f"/generate/{job_id}", params={"forget": "true"})
    answer = await ask()
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
    assert "new key" in answer.json()["detail"]
    assert await gateway.jobs.get(job_id) is None
    assert job_id not in await listed(gateway)


async def test_what_fits_beside_a_text(gateway: RunningGateway) -> None:
    async with running_gateway(gateway.settings, gateway.log.parent, model_path=TINY) as tiny:
        await fits(tiny)


async def fits(gateway: RunningGateway) -> None:
    async def fit(lyrics: str, **more: str) -> dict[str, int]:
        answer = await gateway.http.post("/api/fit", json={"lyrics": lyrics} | more)
        assert answer.status_code == 200, answer.text
        found: dict[str, int] = answer.json()
        return found

    blank, short, long = await fit(""), await fit("la la la", tags="pop"), await fit("la la la " * 20, tags="pop")
    assert 0 < blank["prompt_tokens"] < short["prompt_tokens"] < long["prompt_tokens"]
    assert short["longest_ms"] - long["longest_ms"] == 80 * (long["prompt_tokens"] - short["prompt_tokens"])
    song = {"lyrics": "la la la " * 20, "tags": "pop"}
    longest = await gateway.http.post("/generate", json=song | {"max_duration_ms": long["longest_ms"]})
    assert longest.status_code == 202
    longer = await gateway.http.post("/generate", json=song | {"max_duration_ms": long["longest_ms"] + 80})
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
async def test_text_that_cannot_be_measured(gateway: RunningGateway, body: object, status: int, words: str) -> None:
    answer = await gateway.http.post("/api/fit", json=body)
    assert answer.status_code == status
    assert words in answer.json()["detail"]


async def test_a_form_of_another_site_is_refused(gateway: RunningGateway) -> None:
    answer = await gateway.http.post("/api/fit", content="{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


async def test_objects_of_a_removed_song_that_come_late_are_swept(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("gateway-swept")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with running_gateway(settings, folder, sweep_seconds=1.0) as gateway:
        job_id = await gateway.submit()
        await gateway.complete(job_id)
        await gateway.http.delete(f"/generate/{job_id}", params={"forget": "true"})
        await gateway.store.put(f"audio/{job_id}/9.flac", b"x")  # by a worker that had lost its lease

        async def gone() -> bool:
            return not await gateway.store.list(f"audio/{job_id}/")

        await eventually(gone, "it is still there")


async def test_texts_are_measured_a_few_at_a_time_and_songs_are_taken_meanwhile(gateway: RunningGateway) -> None:
    """Texts beyond a client's rate are refused before the tokenizer sees them."""
    async with running_gateway(gateway.settings, gateway.log.parent) as second:
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
