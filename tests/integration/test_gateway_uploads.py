"""How uploads arrive: slowly, for long, in part, from elsewhere, and while servers are away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
from nats.aio.client import Client
from nats.js.api import PubAck

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.api import http_protocol
from services.gateway.recordings import storing, uploads
from services.gateway.submission import outage
from services.gateway.uploads.receiver import UploadLimits
from services.gateway.uploads.room import Reservation
from shared.errors import NoRoom, QueueFull, Unavailable
from shared.jobs.queues import queue_recording
from shared.jobs.store import change
from shared.nats.errors import nats_errors
from shared.nats.subjects import DEC, TENANT, encode_subject
from shared.schema.job import Job
from tests.integration.gateway_fixtures import eventually, fresh_settings, in_process
from tests.integration.uploading import DATA, Connected, Gateway, head


@pytest.fixture(scope="module")
async def shared(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    settings = await fresh_settings(nats_server, s3_server, tmp_path_factory.mktemp("uploads"))
    async with in_process(replace(settings, engine="trivial")) as found:
        yield Gateway(*found)


@pytest.fixture
async def gateway(shared: Gateway) -> Gateway:
    """The gateway of all tests here, without the recordings of those before."""

    async def emptied() -> bool:
        with contextlib.suppress(Unavailable):
            for found in (await shared.parts.recordings.page("local", 99, None, None)).recordings:
                await shared.parts.recording_removal.remove("local", found.recording_id)
            return True
        return False

    await eventually(emptied, "the servers are not back")
    return shared


async def test_an_upload_that_is_too_slow_is_cut(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.parts.uploads, "limits", UploadLimits(lowest_rate=1e9, grace=0.2))
    connected = await gateway.connect(head() + DATA[:100])
    status, lines, body = await gateway.answer(connected)
    assert (status, body["type"]) == (408, "/problems/too-slow")
    assert "connection: close" in lines
    await gateway.nothing_left()


async def test_an_upload_may_last_longer_than_any_other_body(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands still for longer than others may, too."""
    monkeypatch.setattr(http_protocol, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(http_protocol, "STILL_SECONDS", 0.05)
    connected = await gateway.connect(head(len(DATA), "Connection: close"))
    for at in range(0, len(DATA), len(DATA) // 4):
        connected[1].write(DATA[at : at + len(DATA) // 4])
        await asyncio.sleep(0.1)
    assert (await gateway.answer(connected))[0] == 202


@pytest.mark.parametrize("chunked", [False, True], ids=["of known length", "chunked"])
async def test_a_client_that_leaves_leaves_nothing_behind(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, chunked: bool
) -> None:
    start = b"POST /recordings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1000000\r\n"
    tasks = len(asyncio.all_tasks())
    _, writer = await gateway.connect((start if chunked else head(99_000_000)) + bytes(2_000_000))
    await gateway.receiving()
    writer.transport.abort()
    await gateway.nothing_left()

    async def ended() -> bool:
        return len(asyncio.all_tasks()) <= tasks

    await eventually(ended, "a task is left")
    assert "unexpected" not in caplog.text


async def test_a_client_that_asks_first_is_not_sent_for_what_is_refused(gateway: Gateway) -> None:
    connected = await gateway.connect(head(100_000_001, "Expect: 100-continue"))
    status, lines, body = await gateway.answer(connected)
    assert (status, body["type"]) == (413, "/problems/too-large")
    assert "100 mb" in str(body["detail"]).lower()
    assert "connection: close" in lines
    async with httpx.AsyncClient(base_url=gateway.base, trust_env=False) as http:  # and one that is taken, is
        answer = await http.post("/recordings", content=DATA, headers={"Expect": "100-continue"})
        assert answer.status_code == 202


async def test_the_answer_arrives_although_the_client_is_still_sending(gateway: Gateway) -> None:
    """Some clients read nothing before they have sent everything, and no answer from a connection that was reset."""
    reader, writer = await gateway.connect(head(100_000_001))
    for _ in range(30):
        writer.write(bytes(100_000))
        await writer.drain()
    status, _, body = await gateway.answer((reader, writer))
    assert (status, body["type"]) == (413, "/problems/too-large")


async def test_without_room_nothing_is_taken(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """There has to be room for what the file is decoded to, too."""
    reserve = gateway.parts.uploads._room.reserve

    def full(size: int) -> contextlib.AbstractContextManager[Reservation]:
        if size < 100_000_000:
            return reserve(size)
        raise NoRoom("disk", f"the data folder has no room for another {size:,} bytes at the moment")

    monkeypatch.setattr(gateway.parts.uploads._room, "reserve", full)
    status, lines, body = await gateway.answer(await gateway.connect(head()))
    assert (status, body["service"]) == (503, "disk")
    assert "retry-after: 60" in lines


@pytest.mark.parametrize("limit", ["MOST_UPLOADS", "MOST_OF_TENANT"])
async def test_so_many_uploads_are_received_at_once(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(uploads, limit, 1)
    _, writer = await gateway.connect(head(99_000_000) + bytes(2_000_000))
    await gateway.receiving()
    status, lines, body = await gateway.answer(await gateway.connect(head()))
    assert (status, "retry-after" in lines) == (503, True)
    assert "as many recordings" in str(body["detail"])
    writer.transport.abort()
    await gateway.nothing_left()
    async with httpx.AsyncClient(base_url=gateway.base, trust_env=False) as http:
        assert (await http.post("/recordings", content=DATA)).status_code == 202


async def test_an_upload_that_waits_for_a_decoder_keeps_its_place(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is on the disk, and its client may be gone: files may not pile up."""
    monkeypatch.setattr(uploads, "MOST_UPLOADS", 1)
    free = gateway.parts.uploads._free
    await free.acquire()
    await free.acquire()
    first = await gateway.connect(head(len(DATA), "Connection: close") + DATA)

    async def arrived() -> bool:
        return any(path.stat().st_size == len(DATA) for path in gateway.scratch.glob("*/upload"))

    await eventually(arrived, "the first does not arrive")
    refused = await gateway.answer(await gateway.connect(head()))
    free.release()
    free.release()
    assert (refused[0], (await gateway.answer(first))[0]) == (503, 202)


async def test_a_file_that_is_there_is_not_decoded_again(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async with httpx.AsyncClient(base_url=gateway.base, trust_env=False) as http:
        first = await http.post("/recordings", content=DATA)
        monkeypatch.setattr(uploads, "decode_recording", None)
        again = await http.post("/recordings", content=DATA)
        assert (again.status_code, again.json()) == (202, first.json())
        other = await http.post("/recordings", content=DATA + b"x")
        assert other.status_code == 500  # which shows that it would be noticed


@pytest.mark.parametrize("kind", ["audio/flac", "text/plain", "multipart/form-data; boundary=b"])
async def test_a_page_of_another_origin_cannot_upload(gateway: Gateway, kind: str) -> None:
    """A browser sends the last two without asking first."""
    sent = head(99_000_000, "Origin: https://evil.example", f"Content-Type: {kind}")
    status, lines, body = await gateway.answer(await gateway.connect(sent))
    assert (status, body["type"]) == (403, "/problems/foreign-origin")
    assert "connection: close" in lines
    await gateway.nothing_left()


async def test_a_name_that_is_not_the_services_is_refused(gateway: Gateway) -> None:
    sent = head().replace(b"localhost", b"rebound.example")
    assert (await gateway.answer(await gateway.connect(sent)))[0] == 421


# --- servers that are away


async def sent_in_part(gateway: Gateway) -> Connected:
    """An upload of which the last byte is missing."""
    connected = await gateway.connect(head(len(DATA), "Connection: close") + DATA[:-1])
    await gateway.begun()
    return connected


@pytest.mark.parametrize("away", ["nats", "s3"])
async def test_an_upload_waits_while_a_server_is_away_for_a_short_time(
    gateway: Gateway, nats_server: NatsServer, s3_server: S3Server, away: str
) -> None:
    connected = await sent_in_part(gateway)
    server = nats_server if away == "nats" else s3_server
    server.kill()
    connected[1].write(DATA[-1:])
    await server.start()
    status, _, body = await gateway.answer(connected)
    assert (status, body["status"]) == (202, "queued")
    assert (await gateway.parts.js.stream_info(DEC)).state.messages == 1


@pytest.mark.parametrize("away", ["nats", "s3"])
async def test_an_upload_is_refused_while_a_server_is_away_and_leaves_nothing(
    gateway: Gateway, nats_server: NatsServer, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    monkeypatch.setattr(outage, "PATIENCE", 0.1)
    connected = await sent_in_part(gateway)
    server = nats_server if away == "nats" else s3_server
    server.kill()
    connected[1].write(DATA[-1:])
    status, lines, body = await gateway.answer(connected)
    assert (status, body["type"], body["service"]) == (503, "/problems/unavailable", away)
    assert "retry-after" in lines
    await server.start()

    async def listed() -> bool:
        with contextlib.suppress(Unavailable), nats_errors("NATS does not answer"):
            await gateway.nothing_left()
            return True
        return False

    await eventually(listed, "the server is not back")

    async def taken() -> bool:
        answer = await gateway.answer(await gateway.connect(head(len(DATA), "Connection: close") + DATA))
        return answer[0] == 202

    await eventually(taken, "the same file is not taken")


@pytest.mark.parametrize("then", ["it waits", "it is encoded"])
async def test_a_record_that_cannot_be_queued_is_withdrawn_unless_another_request_has_it(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """The first request stores a record; the second is answered with it, and then the first cannot queue it."""
    queue, blocked = queue_recording, asyncio.Event()

    async def fail_once(nc: Client, job: Job) -> PubAck | None:
        if blocked.is_set():
            return await queue(nc, job)
        blocked.set()
        await found.wait()
        raise QueueFull("as many songs wait as may; try again in a while")

    found = asyncio.Event()
    monkeypatch.setattr(storing, "queue_recording", fail_once)
    monkeypatch.setattr(gateway.parts.uploads, "_locks", Unlocked())  # as of two gateways
    async with httpx.AsyncClient(base_url=gateway.base, trust_env=False, timeout=30) as http:
        first = asyncio.create_task(http.post("/recordings", content=DATA))
        await blocked.wait()
        second = await http.post("/recordings", content=DATA)
        assert second.status_code == 202
        job_id, status = second.json()["recording_id"], "queued"
        if then == "it is encoded":  # by a worker that was quick
            await gateway.parts.jobs.update(job_id, TENANT, lambda job: change(job, status="generating"))
            message = await gateway.parts.js.get_msg(DEC, subject=encode_subject(job_id))
            await gateway.parts.js.delete_msg(DEC, message.seq or 0)
            status = "encoding"
        found.set()
        assert (await first).status_code == 429
        assert (await http.get(second.headers["location"])).json() == second.json() | {"status": status}
        assert (await http.get(second.json()["audio_url"])).status_code == 200


class Unlocked(dict[str, asyncio.Lock]):
    """Another lock for every request."""

    def setdefault(self, key: str, default: asyncio.Lock | None = None) -> asyncio.Lock:
        return asyncio.Lock()
