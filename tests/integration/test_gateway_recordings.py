"""Recordings: uploaded, listed, played, removed; the same file is the same recording."""

import asyncio
import functools
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile
from nats.js.errors import NotFoundError

from deploy.local.servers.embedded import NatsServer, S3Server
from shared.jobs.recordings import recording_id
from shared.jobs.store import change
from shared.nats.subjects import DEC, JOBS, TENANT, encode_subject, job_subject
from shared.schema.base import CONTINUED_SCHEMA, RECORDING_SCHEMA
from shared.schema.job import Job, Parent, Status, TokenJob
from shared.storage.keys import recording_tokens_key
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, running_gateway
from tests.unit.recordings import RATE, file_of, music

LENGTHS = iter(np.arange(1.1, 2.9, 0.01))  # seconds: a file for every test, of which no other knows


def fresh() -> bytes:
    """A file that was never uploaded."""
    return file_of("wav", music(float(next(LENGTHS))))


class Recorder:
    """Uploads to a gateway, and does the work of encoders."""

    def __init__(self, gateway: RunningGateway) -> None:
        self.gateway, self.http, self.jobs, self.store = gateway, gateway.http, gateway.jobs, gateway.store

    async def upload(self, data: bytes, status: int = 202) -> dict[str, Any]:
        """Upload a file; returns the recording."""
        answer = await self.http.post("/recordings", content=data)
        assert answer.status_code == status, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def move_to(self, job_id: str, *path: Status, **changes: Any) -> None:
        """Move a recording through states, as an encoder does; the changes come with the last one."""
        await self.gateway.move_to(job_id, *path, **changes)

    async def encode(self, job_id: str) -> None:
        """Finish a recording: tokens, record, message."""
        job = await self.gateway.job(job_id)
        assert job.recording is not None
        key = recording_tokens_key(TENANT, job.recording.sha256, "encoder")
        await self.store.put(key, b"tokens")
        await self.move_to(job_id, "generating", "completed", tokens_key=key, frames=12)
        await self.acknowledge(job_id)

    async def acknowledge(self, job_id: str) -> None:
        message = await self.gateway.js.get_msg(DEC, subject=encode_subject(job_id))
        await self.gateway.js.delete_msg(DEC, message.seq or 0)

    async def order(self, job_id: str) -> TokenJob | None:
        """The message of a recording."""
        try:
            message = await self.gateway.js.get_msg(DEC, subject=encode_subject(job_id))
        except NotFoundError:
            return None
        return msgspec.json.decode(message.data or b"", type=TokenJob)

    async def keys(self, job_id: str) -> list[str]:
        """Keys of a recording's objects, by name."""
        keys = [item.key for item in await self.store.list("recordings/")]
        return sorted(key.rpartition("/")[2] for key in keys if recording_id(*key.split("/")[1:3]) == job_id)

    async def record_sequence(self, job_id: str) -> int:
        message = await self.gateway.js.get_msg(f"KV_{JOBS}", subject=job_subject(TENANT, job_id))
        return message.seq or 0


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("recordings")
    settings = await fresh_settings(nats_server, s3_server, folder)
    async with running_gateway(settings, folder, engine="trivial", recording_seconds=3, recording_mb=1) as gateway:
        yield gateway
        assert "Traceback" not in gateway.log.read_text()


@pytest.fixture
def recorder(gateway: RunningGateway) -> Recorder:
    return Recorder(gateway)


async def test_a_recording_is_queued_encoded_and_ready(recorder: Recorder) -> None:
    data = fresh()
    answer = await recorder.http.post("/recordings", content=data, params={"title": "A demo: ümlaut"})
    body = answer.json()
    job_id = body["recording_id"]
    assert (answer.status_code, answer.headers["location"]) == (202, f"/recordings/{job_id}")
    assert answer.headers["retry-after"] == "1"
    audio, rate = soundfile.read(io.BytesIO(data))
    assert body | {"created_at": ""} == {
        "recording_id": job_id,
        "status": "queued",
        "progress": 0,
        "created_at": "",
        "completed_at": None,
        "duration": round(len(audio) / rate, 3),
        "sample_rate": RATE,
        "channels": 2,
        "size": len(data),
        "upload_format": "wav",
        "title": "A demo: ümlaut",
        "audio_url": f"/recordings/{job_id}/audio",
        "peaks_url": f"/recordings/{job_id}/peaks",
    }
    assert await recorder.order(job_id) == TokenJob(schema=RECORDING_SCHEMA, job_id=job_id, tenant=TENANT)
    assert await recorder.keys(job_id) == ["audio.flac"]
    assert (await recorder.http.get(answer.headers["location"])).json() == body

    await recorder.move_to(job_id, "generating", saved_frames=7, error="an attempt failed")
    encoding = (await recorder.http.get(f"/recordings/{job_id}")).json()
    frames = int(body["duration"] * 12.5)
    assert (encoding["status"], encoding["progress"]) == ("encoding", pytest.approx(100 * 7 / frames))
    assert "error" not in encoding
    await recorder.encode(job_id)
    ready = (await recorder.http.get(f"/recordings/{job_id}")).json()
    assert (ready["status"], ready["progress"]) == ("ready", 100)
    assert ready["completed_at"] > ready["created_at"]
    assert (await recorder.http.head(f"/recordings/{job_id}")).status_code == 200


async def test_a_recording_is_heard_before_it_is_encoded(recorder: Recorder) -> None:
    data = fresh()
    url = (await recorder.upload(data))["audio_url"]
    whole = await recorder.http.get(url)
    assert (whole.status_code, whole.headers["content-type"]) == (200, "audio/flac")
    heard, rate = soundfile.read(io.BytesIO(whole.content), dtype="int16")
    sent, _ = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == RATE
    assert np.array_equal(heard, sent)
    part = await recorder.http.get(url, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    assert (await recorder.http.get(url, headers={"Range": "bytes=99999999-"})).status_code == 416
    assert (await recorder.http.get(url, headers={"If-None-Match": whole.headers["etag"]})).status_code == 304
    head = await recorder.http.head(url)
    assert (head.headers["content-length"], head.content) == (str(len(whole.content)), b"")
    mp3 = await recorder.http.get(url, params={"format": "mp3"})
    assert mp3.headers["content-type"] == "audio/mpeg"
    assert b"SEED" not in mp3.content  # none was asked for
    assert soundfile.info(io.BytesIO(mp3.content)).samplerate == RATE
    assert (await recorder.http.get(url, params={"format": "aac"})).status_code == 422
    peaks = (await recorder.http.get(url.replace("/audio", "/peaks"))).json()
    assert (peaks["sample_rate"], len(peaks["data"])) == (RATE, 2 * peaks["length"])


@pytest.mark.parametrize("kind", ["wav", "mp3", "ogg"])
async def test_a_recording_in_mono_is_heard_in_every_format(recorder: Recorder, kind: str) -> None:
    data = file_of("flac", music(float(next(LENGTHS)), channels=1))
    url = (await recorder.upload(data))["audio_url"]
    answer = await recorder.http.get(url, params={"format": kind})
    assert answer.status_code == 200, answer.text
    heard, rate = soundfile.read(io.BytesIO(answer.content), dtype="int16", always_2d=True)
    sent, _ = soundfile.read(io.BytesIO(data), dtype="int16")
    assert (rate, heard.shape[1]) == (RATE, 2)
    assert len(heard) == pytest.approx(len(sent), abs=2000)
    if kind == "wav":
        assert np.array_equal(heard, np.stack([sent, sent], axis=1))


async def test_a_recording_whose_sample_rate_mp3_does_not_have_is_heard_in_other_formats(recorder: Recorder) -> None:
    url = (await recorder.upload(file_of("wav", music(1.05, 96_000), 96_000)))["audio_url"]
    refused = await recorder.http.get(url, params={"format": "mp3"})
    assert (refused.status_code, refused.json()["field"]) == (422, "format")
    assert "96000 Hz" in refused.json()["detail"]
    ogg = await recorder.http.get(url, params={"format": "ogg"})
    assert soundfile.info(io.BytesIO(ogg.content)).samplerate == 96_000


@pytest.mark.parametrize("kind", ["raw", "form", "chunks"])
async def test_the_same_file_is_the_same_recording_however_it_is_sent(recorder: Recorder, kind: str) -> None:
    data = fresh()
    first = await recorder.upload(data)
    before = await recorder.gateway.job(first["recording_id"])

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 10_000):
            yield data[at : at + 10_000]

    match kind:
        case "form":
            answer = await recorder.http.post("/recordings", files={"file": ("../../etc/passwd", data)})
        case "chunks":
            answer = await recorder.http.post("/recordings", content=chunks())
        case _:
            answer = await recorder.http.post("/recordings?title=Other", content=data)
    assert (answer.status_code, answer.json()) == (202, first)
    assert await recorder.gateway.job(first["recording_id"]) == before


async def test_the_same_file_sent_four_times_at_once_is_one_recording(recorder: Recorder) -> None:
    data = fresh()
    before = (await recorder.gateway.js.stream_info(DEC)).state.messages
    found = await asyncio.gather(*(recorder.upload(data) for _ in range(4)))
    assert [body == found[0] for body in found] == [True] * 4
    assert (await recorder.gateway.js.stream_info(DEC)).state.messages == before + 1


async def test_a_recording_that_is_ready_lives_for_longer_when_it_is_sent_again(recorder: Recorder) -> None:
    data = fresh()
    job_id = (await recorder.upload(data))["recording_id"]
    await recorder.encode(job_id)
    before, sequence = await recorder.gateway.job(job_id), await recorder.record_sequence(job_id)
    answer = await recorder.http.post("/recordings", content=data)
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    assert "retry-after" not in answer.headers
    assert await recorder.gateway.job(job_id) == before
    assert await recorder.record_sequence(job_id) > sequence
    assert await recorder.order(job_id) is None


async def test_a_recording_whose_message_is_missing_is_queued_when_it_is_sent_again(recorder: Recorder) -> None:
    """The gateway that took it died in between."""
    data = fresh()
    job_id = (await recorder.upload(data))["recording_id"]
    await recorder.acknowledge(job_id)
    await recorder.upload(data)
    assert await recorder.order(job_id) is not None


@pytest.mark.parametrize("lost", ["audio", "tokens"])
async def test_a_recording_whose_objects_were_lost_is_whole_when_it_is_sent_again(
    recorder: Recorder, lost: str
) -> None:
    data = fresh()
    job_id = (await recorder.upload(data))["recording_id"]
    await recorder.encode(job_id)
    job = await recorder.gateway.job(job_id)
    await recorder.store.delete_one((job.audio_key if lost == "audio" else job.tokens_key) or "")
    if lost == "audio":
        assert (await recorder.http.get(f"/recordings/{job_id}/audio")).status_code == 410
    found = await recorder.upload(data, 200 if lost == "audio" else 202)
    assert found["status"] == ("ready" if lost == "audio" else "queued")
    assert (await recorder.http.get(f"/recordings/{job_id}/audio")).status_code == 200
    assert (await recorder.order(job_id) is None) == (lost == "audio")


@pytest.mark.parametrize("status", ["queued", "encoding", "ready", "failed"])
async def test_a_recording_is_removed_in_every_state_and_can_be_sent_again(recorder: Recorder, status: str) -> None:
    data = fresh()
    job_id = (await recorder.upload(data))["recording_id"]
    match status:
        case "encoding":
            await recorder.move_to(job_id, "generating")
        case "ready":
            await recorder.encode(job_id)
        case "failed":
            await recorder.move_to(job_id, "generating", "failed", error="no")
            await recorder.acknowledge(job_id)
    stops = await recorder.gateway.nc.subscribe(f"ctl.cancel.{job_id}")
    answer = await recorder.http.delete(f"/recordings/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert await recorder.keys(job_id) == []
    assert await recorder.order(job_id) is None
    if status == "encoding":
        await stops.next_msg(timeout=10)  # what an encoder stops at
    for path in ("", "/audio", "/peaks"):
        assert (await recorder.http.get(f"/recordings/{job_id}{path}")).json()["type"] == "/problems/unknown-recording"
    assert (await recorder.http.delete(f"/recordings/{job_id}")).status_code == 404
    again = await recorder.upload(data)
    assert (again["recording_id"], again["status"]) == (job_id, "queued")
    assert await recorder.order(job_id) is not None
    assert await recorder.keys(job_id) == ["audio.flac"]


async def test_a_recording_that_failed_says_why_and_can_be_sent_again(recorder: Recorder) -> None:
    data = fresh()
    job_id = (await recorder.upload(data))["recording_id"]
    await recorder.move_to(job_id, "generating", "failed", error="the encoder has too little memory")
    body = (await recorder.http.get(f"/recordings/{job_id}")).json()
    assert (body["status"], body["error"]) == ("failed", "the encoder has too little memory")
    gone = await recorder.http.get(f"/recordings/{job_id}/audio")
    assert (gone.status_code, gone.json()["type"]) == (410, "/problems/no-audio")
    assert "recording failed: the encoder has too little memory" in gone.json()["detail"]
    again = await recorder.upload(data)
    assert (again["recording_id"], again["status"]) == (job_id, "queued")
    assert "error" not in again


async def test_recordings_are_listed_apart_from_songs(recorder: Recorder) -> None:
    song = await recorder.gateway.submit()
    ids = [(await recorder.upload(fresh()))["recording_id"] for _ in range(3)]
    await recorder.encode(ids[1])
    page = (await recorder.http.get("/recordings", params={"limit": 2})).json()
    assert [found["recording_id"] for found in page["recordings"]] == [ids[2], ids[1]]
    rest = (await recorder.http.get("/recordings", params={"limit": 2, "cursor": page["next"]})).json()
    assert rest["recordings"][0]["recording_id"] == ids[0]
    ready = (await recorder.http.get("/recordings", params={"status": "ready", "limit": 1})).json()
    assert [found["recording_id"] for found in ready["recordings"]] == [ids[1]]
    assert (await recorder.http.get("/recordings", params={"status": "completed"})).status_code == 422
    songs = (await recorder.http.get("/generate")).json()["songs"]
    assert [found["job_id"] for found in songs] == [song]
    for method, path in [
        *(("GET", path) for path in ("", "/status", "/result", "/stream", "/peaks", "/events", "/tree")),
        ("DELETE", ""),
        ("DELETE", "?forget=true"),
    ]:
        answer = await recorder.http.request(method, f"/generate/{ids[1]}{path}")
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/unknown-job"), path
    for path in ("", "/audio", "/peaks"):
        answer = await recorder.http.get(f"/recordings/{song}{path}")
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/unknown-recording")
    assert (await recorder.http.delete(f"/recordings/{song}")).status_code == 404
    reply = await recorder.gateway.nc.request(f"record.{TENANT}.{ids[1]}", timeout=10)
    assert json.loads(reply.data)["error"]["code"] == 404


async def test_a_recording_names_the_songs_that_go_on_from_it_and_leaves_them_whole(recorder: Recorder) -> None:
    job_id = (await recorder.upload(fresh()))["recording_id"]
    song = Job(
        schema=CONTINUED_SCHEMA,
        job_id="goes-on",
        tenant=TENANT,
        request=(await recorder.gateway.job(await recorder.gateway.submit())).request,
        created_at=1.0,
        parent=Parent(recording_id=job_id, frames=3, least_frames=4),
    )
    await recorder.jobs.create(song)
    assert (await recorder.http.get(f"/recordings/{job_id}")).json()["children"] == ["goes-on"]
    await recorder.http.delete(f"/recordings/{job_id}")
    assert await recorder.jobs.get("goes-on") == song


async def test_the_addresses_of_recordings_name_their_methods(recorder: Recorder) -> None:
    for path, methods in (("/recordings", "GET, OPTIONS, POST"), ("/recordings/x", "DELETE, GET, HEAD, OPTIONS")):
        answer = await recorder.http.options(path)
        assert (answer.status_code, answer.headers["allow"]) == (204, methods)
    assert (await recorder.http.put("/recordings")).status_code == 405


# --- refusals


def form(*parts: tuple[str, bytes]) -> dict[str, Any]:
    return {"files": [(name, ("x", data)) for name, data in parts]}


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({"content": b""}, 415, "unknown-audio-format"),
    "text": ({"content": b"hello"}, 415, "unknown-audio-format"),
    "a page": ({"content": b"<html>" * 100, "headers": {"Content-Type": "audio/wav"}}, 415, "unknown-audio-format"),
    "six channels": ({"content": file_of("wav", music(1.5, 8000, 6), 8000)}, 415, "unsupported-audio"),
    "no sample": ({"content": file_of("wav", music(0))}, 422, "audio-too-short"),
    "half a second": ({"content": file_of("flac", music(0.5))}, 422, "audio-too-short"),
    "four seconds": ({"content": file_of("flac", music(4))}, 413, "audio-too-long"),
    "a megabyte": ({"content": bytes(1_000_001)}, 413, "too-large"),
    "broken flac": ({"content": b"fLaC" + bytes(1000)}, 422, "damaged-audio"),
    "another field": (form(("sound", b"x")), 400, "malformed-form"),
    "two files": (form(("file", b"x"), ("file", b"y")), 400, "malformed-form"),
    "half a form": (
        {"content": b"--b\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
        400,
        "malformed-form",
    ),
    "no boundary": ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "malformed-form"),
    "a long title": ({"content": b"x", "params": {"title": "x" * 301}}, 422, "invalid-request"),
    "an ill title": ({"content": b"x", "params": {"title": "a\nb"}}, 422, "invalid-request"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_used_is_refused_in_words_and_leaves_nothing(recorder: Recorder, name: str) -> None:
    request, status, kind = REFUSED[name]
    before = await left(recorder.gateway)
    answer = await recorder.http.post("/recordings", **request)
    assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{kind}"), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert await left(recorder.gateway) == before
    metrics = (await recorder.http.get("/metrics")).text
    assert kind == "invalid-request" or f'heartmula_recordings_refused_total{{reason="{kind}"}}' in metrics


async def left(gateway: RunningGateway) -> tuple[list[str], int, list[str]]:
    """What uploads may leave behind: objects, the latest record, files."""
    objects = [item.key for item in await gateway.store.list("recordings/")]
    records = (await gateway.js.stream_info(f"KV_{JOBS}")).state.messages
    return objects, records, [path.name for path in (gateway.settings.data_dir / "tmp").glob("*")]


async def test_a_full_queue_takes_no_recording_and_keeps_none(recorder: Recorder) -> None:
    gateway = recorder.gateway
    config = (await gateway.js.stream_info(DEC)).config
    info = await gateway.js.stream_info(DEC)
    await gateway.js.update_stream(config.evolve(max_msgs=info.state.messages))
    before, data = await left(gateway), fresh()
    answer = await recorder.http.post("/recordings", content=data)
    assert (answer.status_code, answer.json()["type"]) == (429, "/problems/queue-full")
    assert "retry-after" in answer.headers
    assert await left(gateway) == before
    await gateway.js.update_stream(config.evolve(max_msgs=config.max_msgs))
    await recorder.upload(data)


async def test_a_record_of_a_newer_version_is_left_alone(recorder: Recorder) -> None:
    data = fresh()
    job_id = (await recorder.upload(data))["recording_id"]
    job = await recorder.gateway.job(job_id)
    newer = msgspec.json.encode(msgspec.structs.replace(job, schema=99))
    await recorder.gateway.js.publish(job_subject(TENANT, job_id), newer)
    answer = await recorder.http.post("/recordings", content=data)
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/conflict")
    assert await recorder.keys(job_id) == ["audio.flac"]


async def test_a_record_changed_by_hand_stays_what_it_is(recorder: Recorder) -> None:
    """A cancelled one was about to be removed when the gateway died; it is shown, and can be sent again or removed."""
    data = fresh()
    job_id = (await recorder.upload(data))["recording_id"]
    await recorder.jobs.update(job_id, TENANT, functools.partial(change, status="cancelled"))
    body = (await recorder.http.get(f"/recordings/{job_id}")).json()
    assert (body["status"], "upload it again" in body["error"]) == ("failed", True)
    assert (await recorder.upload(data))["status"] == "queued"
