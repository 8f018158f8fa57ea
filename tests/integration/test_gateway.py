"""Submitting songs, their state, and cancelling them, over HTTP against a gateway process on real servers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from nats.js.errors import NotFoundError

from deploy.local.servers.embedded import NatsServer, S3Server
from shared.model.checkpoint import open_checkpoint
from shared.model.prompt import Prompter
from shared.nats.subjects import EVENTS, JOBS, TENANT, TOK, cancel_subject, token_subject
from shared.schema.event import CloudEvent, Failed
from shared.schema.job import TokenJob
from shared.storage.keys import audio_key, tokens_key
from tests.integration.gateway_fixtures import SONG, TINY, RunningGateway, eventually, fresh_settings, running_gateway

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


def problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """Decode an answer that is a problem detail."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"/problems/{kind}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    return body


async def count(gateway: RunningGateway, stream: str) -> int:
    return (await gateway.js.stream_info(stream)).state.messages


# --- taking a song


async def test_a_song_is_accepted_only_with_its_job_in_the_stream(gateway: RunningGateway) -> None:
    answer = await gateway.http.post("/generate", json=SONG | {"seed": 7, "title": "Ü", "priority": "high"})
    assert answer.status_code == 202
    body = answer.json()
    job_id = body.pop("job_id")
    assert body.pop("queue_position") >= 0
    base = f"/generate/{job_id}"
    assert body == {
        "status": "queued",
        "status_url": f"{base}/status",
        "stream_url": f"{base}/stream",
        "result_url": f"{base}/result",
        "events_url": f"{base}/events",
    }
    assert answer.headers["location"] == f"{base}/status"
    assert int(answer.headers["retry-after"]) > 0

    message = await gateway.js.get_msg(TOK, subject=token_subject("high", job_id))
    assert msgspec.json.decode(message.data or b"", type=TokenJob) == TokenJob(job_id=job_id, tenant=TENANT)
    job = await gateway.job(job_id)
    assert job.status == "queued"
    assert (job.request.seed, job.request.title, job.request.max_duration_ms) == (7, "Ü", 4000)
    event = await gateway.event(job_id, "queued")
    assert msgspec.json.decode(event.data or b"", type=CloudEvent).data.job_id == job_id


async def test_seed_and_length_are_filled_in(gateway: RunningGateway) -> None:
    first, second = [await gateway.job(await gateway.submit(max_duration_ms=None)) for _ in range(2)]
    assert first.request.seed != second.request.seed
    checkpoint = open_checkpoint(gateway.settings.model_path)
    prompter = Prompter(checkpoint)
    longest = prompter.longest_ms(prompter.encode(SONG["tags"], SONG["lyrics"]))  # type: ignore[arg-type]
    assert first.request.max_duration_ms == min(120_000, longest)


async def test_a_song_that_is_too_long_is_refused_with_the_length_that_fits(gateway: RunningGateway) -> None:
    body = problem(
        await gateway.http.post("/generate", json=SONG | {"max_duration_ms": 600_000}), 422, "invalid-request"
    )
    assert body["field"] == "max_duration_ms"
    (longest,) = [int(word) for word in body["detail"].split() if word.isdigit()]
    assert (await gateway.job(await gateway.submit(max_duration_ms=longest))).request.max_duration_ms == longest
    assert (
        await gateway.job(await gateway.submit(max_duration_ms=longest + 79))
    ).request.max_duration_ms == longest + 79
    problem(await gateway.http.post("/generate", json=SONG | {"max_duration_ms": longest + 80}), 422, "invalid-request")


async def test_lyrics_that_leave_no_room_are_refused_with_how_much_is_too_much(gateway: RunningGateway) -> None:
    async with running_gateway(gateway.settings, gateway.log.parent, model_path=TINY) as tiny:
        body = problem(await tiny.http.post("/generate", json={"lyrics": "la " * 6000}), 422, "invalid-request")
    assert body["field"] == "lyrics"
    assert "tokens too long" in body["detail"]


@pytest.mark.parametrize(
    "values",
    [
        {"lyrics": "", "tags": "pop"},
        {"lyrics": "la", "tags": ""},
        {"lyrics": "Größe 歌 🎵\r\n\tla"},
        {"lyrics": "la", "seed": 0, "temperature": 0, "cfg_scale": 1, "topk": 1, "format": "mp3"},
        {"lyrics": "la", "seed": None, "max_duration_ms": 80, "title": None},
    ],
)
async def test_unusual_but_right_requests_are_accepted(gateway: RunningGateway, values: dict[str, Any]) -> None:
    assert (await gateway.http.post("/generate", json=values)).status_code == 202


@pytest.mark.parametrize(
    ("body", "status", "kind", "field"),
    [
        (b"", 400, "malformed-json", None),
        (b"{", 400, "malformed-json", None),
        (b'{"lyrics": "la",}', 400, "malformed-json", None),
        (b'{"lyrics": "\xff"}', 400, "malformed-json", None),
        (b'{"lyrics": "\\ud800"}', 400, "malformed-json", None),
        (b'{"lyrics": "la", "temperature": NaN}', 400, "malformed-json", None),
        (b"[" * 10_000, 422, "invalid-request", None),
        (b"[]", 422, "invalid-request", None),
        (b"null", 422, "invalid-request", None),
        (b"{}", 422, "invalid-request", "lyrics"),
        (b'{"tags": "pop"}', 422, "invalid-request", "lyrics"),
        (b'{"lyrics": null}', 422, "invalid-request", "lyrics"),
        (b'{"lyrics": 1}', 422, "invalid-request", "lyrics"),
        (b'{"lyrics": " \\n", "tags": " "}', 422, "invalid-request", "lyrics"),
        (b'{"lyrics": "a\\u0000b"}', 422, "invalid-request", "lyrics"),
        (b'{"lyrics": "a\\u001bb"}', 422, "invalid-request", "lyrics"),
        (b'{"lyrics": "' + b"a" * 60_001 + b'"}', 422, "invalid-request", "lyrics"),
        (b'{"lyrics": "la", "tags": "\\u0007"}', 422, "invalid-request", "tags"),
        (b'{"lyrics": "la", "tags": ["pop"]}', 422, "invalid-request", "tags"),
        (b'{"lyrics": "la", "tags": "' + b"a" * 4_001 + b'"}', 422, "invalid-request", "tags"),
        (b'{"lyrics": "la", "title": "a\\nb"}', 422, "invalid-request", "title"),
        (b'{"lyrics": "la", "title": "' + b"a" * 301 + b'"}', 422, "invalid-request", "title"),
        (b'{"lyrics": "la", "seed": "1"}', 422, "invalid-request", "seed"),
        (b'{"lyrics": "la", "seed": -1}', 422, "invalid-request", "seed"),
        (b'{"lyrics": "la", "seed": 1.5}', 422, "invalid-request", "seed"),
        (b'{"lyrics": "la", "seed": true}', 422, "invalid-request", "seed"),
        (b'{"lyrics": "la", "seed": 9007199254740992}', 422, "invalid-request", "seed"),
        (b'{"lyrics": "la", "seed": ' + b"9" * 400 + b"}", 422, "invalid-request", "seed"),
        (b'{"lyrics": "la", "max_duration_ms": 79}', 422, "invalid-request", "max_duration_ms"),
        (b'{"lyrics": "la", "max_duration_ms": 3600001}', 422, "invalid-request", "max_duration_ms"),
        (b'{"lyrics": "la", "max_duration_ms": "1000"}', 422, "invalid-request", "max_duration_ms"),
        (b'{"lyrics": "la", "temperature": -0.1}', 422, "invalid-request", "temperature"),
        (b'{"lyrics": "la", "temperature": 5.1}', 422, "invalid-request", "temperature"),
        (b'{"lyrics": "la", "temperature": 1e999}', 422, "invalid-request", "temperature"),
        (b'{"lyrics": "la", "temperature": null}', 422, "invalid-request", "temperature"),
        (b'{"lyrics": "la", "cfg_scale": 21}', 422, "invalid-request", "cfg_scale"),
        (b'{"lyrics": "la", "topk": 0}', 422, "invalid-request", "topk"),
        (b'{"lyrics": "la", "format": "aac"}', 422, "invalid-request", "format"),
        (b'{"lyrics": "la", "priority": "urgent"}', 422, "invalid-request", "priority"),
        (b'{"lyrics": "la", "webhook_events": []}', 422, "invalid-request", "webhook_events"),
        (b'{"lyrics": "la", "webhook_events": "audio"}', 422, "invalid-request", "webhook_events"),
        (b'{"lyrics": "la", "webhook_events": ["ended", "begun"]}', 422, "invalid-request", "webhook_events"),
        (b'{"lyrics": "la", "webhook_events": [3]}', 422, "invalid-request", "webhook_events"),
        (b'{"lyrics": "la", "webhook_events": ["audio"]}', 422, "invalid-request", "webhook_events"),
        (b'{"lyrics": "la", "lirycs": "la"}', 422, "invalid-request", "lirycs"),
        (b'{"lyrics": "' + b"a" * 262_144 + b'"}', 413, "too-large", None),
    ],
    ids=lambda value: value[:48].decode("latin-1") if isinstance(value, bytes) else None,
)
async def test_bad_input_is_reported_in_words_and_leaves_nothing_behind(
    gateway: RunningGateway, body: bytes, status: int, kind: str, field: str | None
) -> None:
    before = await count(gateway, TOK), await count(gateway, f"KV_{JOBS}")
    answer = await gateway.http.post("/generate", content=body, headers={"Content-Type": "application/json"})
    detail = problem(answer, status, kind)
    assert detail.get("field") == field
    assert "Traceback" not in answer.text
    assert (await count(gateway, TOK), await count(gateway, f"KV_{JOBS}")) == before


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_other_content_types_are_refused(gateway: RunningGateway, kind: str) -> None:
    answer = await gateway.http.post("/generate", content=b'{"lyrics": "la"}', headers={"Content-Type": kind})
    assert "application/json" in problem(answer, 415, "unsupported-media-type")["detail"]


async def test_a_body_without_a_declared_length_is_limited_too(gateway: RunningGateway) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    problem(await gateway.http.post("/generate", content=endless(), headers=headers), 413, "too-large")


async def test_unknown_addresses_and_methods_are_problems(gateway: RunningGateway) -> None:
    problem(await gateway.http.get("/nowhere"), 404, "not-found")
    problem(await gateway.http.get("/static/..%2fapp.py"), 404, "not-found")
    answer = await gateway.http.put("/generate", json=SONG)
    assert "POST" in problem(answer, 405, "method-not-allowed")["detail"]
    assert "POST" in answer.headers["allow"]


# --- the state of a song


@pytest.mark.parametrize("job_id", [UNKNOWN, "x", "*", "%3E", "a.b", "local.x", "%00", "..", "é" * 36, "-" * 36])
async def test_an_unknown_song_is_404_everywhere(gateway: RunningGateway, job_id: str) -> None:
    if job_id != "..":  # resolved by the client
        problem(await gateway.http.get(f"/generate/{job_id}/status"), 404, "unknown-job")
        problem(await gateway.http.get(f"/generate/{job_id}/result"), 404, "unknown-job")
        problem(await gateway.http.delete(f"/generate/{job_id}"), 404, "unknown-job")


async def test_the_state_follows_the_song_and_progress_never_goes_back(gateway: RunningGateway) -> None:
    job_id = await gateway.submit(seed=5, title="Song")

    async def state() -> dict[str, Any]:
        answer = await gateway.http.get(f"/generate/{job_id}/status")
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-cache"
        body: dict[str, Any] = answer.json()
        return body

    queued = await state()
    assert queued.pop("created_at").endswith("Z")
    assert queued.pop("queue_position") >= 0
    assert queued == {
        "job_id": job_id,
        "status": "queued",
        "progress": 0,
        "completed_at": None,
        "playable_seconds": 0,
        "seed": 5,
        "title": "Song",
        "format": "flac",
    }
    await gateway.move_to(job_id, "generating")
    assert (await state())["progress"] == 0
    await gateway.stage(job_id)
    await gateway.progress(job_id, 50)
    generating = await state()
    assert (generating["status"], generating["progress"], generating["stage"]) == ("generating", 50, "generating")
    async with gateway.watch(job_id, after=0) as watcher:  # the gateway has seen the event as well
        while (await watcher.frame())["type"] != "heartmula.song.progress":
            pass
    await gateway.progress(job_id, 20)  # another worker began anew
    assert (await state())["progress"] == 50
    await gateway.move_to(job_id, "decoding")
    assert (await state())["progress"] == 80
    await gateway.complete(job_id)
    done = await state()
    assert (done["status"], done["progress"], done["duration"]) == ("completed", 100, 4.0)
    assert done["completed_at"] > done["created_at"]
    assert "stage" not in done


async def test_a_state_that_has_not_changed_is_not_sent_again(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    await gateway.move_to(job_id, "generating")
    address = f"/generate/{job_id}/status"
    first = await gateway.http.get(address)
    known = {"If-None-Match": first.headers["etag"]}
    again = await gateway.http.get(address, headers=known)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    head = await gateway.http.head(address)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", first.headers["etag"])
    await gateway.progress(job_id, 10)  # the record stays as it is
    changed = await gateway.http.get(address, headers=known)
    assert (changed.status_code, changed.json()["progress"]) == (200, 10)
    known = {"If-None-Match": changed.headers["etag"]}
    await gateway.move_to(job_id, "decoding")
    assert (await gateway.http.get(address, headers=known)).json()["status"] == "decoding"
    problem(await gateway.http.get(f"/generate/{UNKNOWN}/status", headers={"If-None-Match": "*"}), 404, "unknown-job")


async def test_a_failed_song_says_why_and_how_far_it_came(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    await gateway.move_to(job_id, "generating")
    await gateway.progress(job_id, 30)
    await gateway.move_to(job_id, "failed", error="the model said no")
    await gateway.publish(Failed(job_id=job_id, status="failed", progress=0, error="the model said no"))
    body = (await gateway.http.get(f"/generate/{job_id}/status")).json()
    assert (body["status"], body["progress"], body["error"]) == ("failed", 30, "the model said no")
    assert body["completed_at"]


# --- cancelling


async def test_cancelling_a_waiting_song_takes_it_out_of_the_queue(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    answer = await gateway.http.delete(f"/generate/{job_id}")
    assert (answer.status_code, answer.json()) == (200, {"job_id": job_id, "status": "cancelled"})
    with pytest.raises(NotFoundError):
        await gateway.js.get_msg(TOK, subject=token_subject("normal", job_id))
    assert (await gateway.job(job_id)).status == "cancelled"
    assert (await gateway.http.get(f"/generate/{job_id}/status")).json()["status"] == "cancelled"
    assert (await gateway.http.delete(f"/generate/{job_id}")).status_code == 200  # again
    events = await gateway.js.stream_info(EVENTS, subjects_filter=f"events.{TENANT}.{job_id}.cancelled")
    assert events.state.subjects == {f"events.{TENANT}.{job_id}.cancelled": 1}


async def test_cancelling_a_running_song_stops_its_worker_and_removes_its_objects(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    await gateway.move_to(job_id, "generating", fencing_token=3)
    keys = [tokens_key(job_id, 3), audio_key(job_id, 3, "flac")]
    for key in keys:
        await gateway.store.put(key, b"x")
    cancellations = await gateway.nc.subscribe(cancel_subject(job_id))
    await gateway.nc.flush()
    assert (await gateway.http.delete(f"/generate/{job_id}")).status_code == 200
    await cancellations.next_msg(timeout=10)

    async def gone() -> bool:
        listing = gateway.store._client.list_objects
        found = [list(listing(gateway.store.bucket, prefix=key.rsplit("/", 1)[0], recursive=True)) for key in keys]
        return not any(found)

    await eventually(gone, "the objects are still there")


async def test_a_song_that_has_ended_cannot_be_cancelled(gateway: RunningGateway) -> None:
    completed, failed = await gateway.submit(), await gateway.submit()
    await gateway.complete(completed)
    await gateway.move_to(failed, "failed", error="x")
    for job_id, status in ((completed, "completed"), (failed, "failed")):
        assert status in problem(await gateway.http.delete(f"/generate/{job_id}"), 409, "conflict")["detail"]
        assert (await gateway.job(job_id)).status == status


async def test_of_completion_and_cancellation_one_wins(gateway: RunningGateway) -> None:
    for _ in range(5):
        job_id = await gateway.submit()
        await gateway.move_to(job_id, "generating", "decoding")
        ended = asyncio.gather(
            gateway.move_to(job_id, "completed"), gateway.http.delete(f"/generate/{job_id}"), return_exceptions=True
        )
        completed, answer = await ended
        assert isinstance(answer, httpx.Response)
        assert (completed is None) == (answer.status_code == 409)
        assert (await gateway.job(job_id)).status == ("completed" if completed is None else "cancelled")


async def test_many_songs_are_requested_at_once(gateway: RunningGateway) -> None:
    ids = await asyncio.gather(*(gateway.submit(seed=n) for n in range(50)))
    assert len(set(ids)) == 50
    for job_id in ids:
        await gateway.js.get_msg(TOK, subject=token_subject("normal", job_id))
    answers = await asyncio.gather(*(gateway.http.delete(f"/generate/{job_id}") for job_id in ids))
    assert {answer.status_code for answer in answers} == {200}


async def test_the_log_holds_no_lyrics(gateway: RunningGateway) -> None:
    await gateway.submit(lyrics="a secret word: xylophonic")
    await gateway.http.post("/generate", json={"lyrics": "xylophonic", "seed": "x"})
    assert "xylophonic" not in gateway.log.read_text()
