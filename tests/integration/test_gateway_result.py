"""Fetching finished audio: ranges, conditional requests, and every reason why there is no audio."""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator

import httpx
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, running_gateway

AUDIO = bytes(range(256)) * 4


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-result")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


@pytest.fixture(scope="module")
async def url(gateway: RunningGateway) -> str:
    job_id = await gateway.submit(title='Ein "Lied": über/alles\u202e')
    await gateway.complete(job_id, AUDIO)
    return f"/generate/{job_id}/result"


def refused(answer: httpx.Response, status: int, detail: str) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert detail in answer.json()["detail"]


async def test_the_audio_comes_whole(gateway: RunningGateway, url: str) -> None:
    answer = await gateway.http.get(url)
    assert (answer.status_code, answer.content) == (200, AUDIO)
    assert answer.headers["content-length"] == str(len(AUDIO))
    assert answer.headers["content-type"] == "audio/flac"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["etag"].startswith('"')
    assert answer.headers["x-content-type-options"] == "nosniff"
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith('inline; filename="Ein Lied uber alles.flac"; ')
    assert disposition.endswith("filename*=UTF-8''Ein%20Lied%20%C3%BCber%20alles.flac")


@pytest.mark.parametrize(("name", "media_type"), [("wav", "audio/wav"), ("mp3", "audio/mpeg"), ("ogg", "audio/ogg")])
async def test_the_type_is_the_format_that_was_asked_for(gateway: RunningGateway, name: str, media_type: str) -> None:
    job_id = await gateway.submit(format=name)
    await gateway.complete(job_id, AUDIO)
    answer = await gateway.http.get(f"/generate/{job_id}/result")
    assert answer.headers["content-type"] == media_type
    assert f'filename="{job_id}.{name}"' in answer.headers["content-disposition"]


async def test_head_answers_with_the_same_headers_without_the_audio(gateway: RunningGateway, url: str) -> None:
    whole, head = await gateway.http.get(url), await gateway.http.head(url, headers={"Range": "bytes=0-1"})
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "content-type", "etag", "accept-ranges", "content-disposition"):
        assert head.headers[name] == whole.headers[name]


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=1000-", 1000, 1023),
        ("bytes=1000-99999", 1000, 1023),
        ("bytes=-24", 1000, 1023),
        ("bytes=-99999", 0, 1023),
        ("Bytes = 5 - 6", 5, 6),
    ],
)
async def test_a_range_is_served(gateway: RunningGateway, url: str, asked: str, first: int, last: int) -> None:
    answer = await gateway.http.get(url, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, AUDIO[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/1024"
    assert answer.headers["content-length"] == str(last - first + 1)


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "bytes=9-5", "bytes=-", "bytes=x-", "items=0-1", "", "bytes=٣-"])
async def test_a_range_that_cannot_be_read_is_ignored(gateway: RunningGateway, url: str, asked: str) -> None:
    answer = await gateway.http.get(url, headers={b"Range": asked.encode()})
    assert (answer.status_code, answer.content) == (200, AUDIO)


@pytest.mark.parametrize("asked", ["bytes=1024-", "bytes=5000-6000", "bytes=-0"])
async def test_a_range_outside_is_416(gateway: RunningGateway, url: str, asked: str) -> None:
    answer = await gateway.http.get(url, headers={"Range": asked})
    refused(answer, 416, "1024 bytes")
    assert answer.headers["content-range"] == "bytes */1024"


async def test_conditional_requests_are_answered_as_http_says(gateway: RunningGateway, url: str) -> None:
    etag = (await gateway.http.head(url)).headers["etag"]
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = await gateway.http.get(url, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert (await gateway.http.get(url, headers={"If-None-Match": '"x"'})).status_code == 200
    part = {"Range": "bytes=0-9"}
    assert (await gateway.http.get(url, headers=part | {"If-Range": etag})).status_code == 206
    for other in ('"x"', f"W/{etag}", "Sat, 29 Oct 2022 19:43:31 GMT"):
        assert (await gateway.http.get(url, headers=part | {"If-Range": other})).status_code == 200


async def test_a_song_without_audio_says_why(gateway: RunningGateway) -> None:
    waiting, running, failed, cancelled, expired = [await gateway.submit() for _ in range(5)]
    await gateway.move_to(running, "generating")
    await gateway.move_to(failed, "failed", error="the codec said no")
    await gateway.http.delete(f"/generate/{cancelled}")
    await gateway.complete(expired)
    await gateway.store.delete(f"audio/{expired}/")
    for job_id, status, detail in (
        (waiting, 409, "queued"),
        (running, 409, "generating"),
        (failed, 410, "the codec said no"),
        (cancelled, 410, "cancelled"),
        (expired, 410, "expired"),
    ):
        refused(await gateway.http.get(f"/generate/{job_id}/result"), status, detail)
        assert (await gateway.http.head(f"/generate/{job_id}/result")).status_code == status


async def test_clients_that_vanish_do_not_use_up_the_store(gateway: RunningGateway) -> None:
    audio = os.urandom(8 * 1024 * 1024)
    job_id = await gateway.submit()
    await gateway.complete(job_id, audio)
    path = f"/generate/{job_id}/result"

    async def vanish() -> None:
        reader, writer = await asyncio.open_connection(gateway.settings.host, gateway.settings.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await reader.readexactly(1000)
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    for _ in range(4):
        await asyncio.gather(*(vanish() for _ in range(10)))
    answers = await asyncio.gather(*(gateway.http.get(path) for _ in range(10)))
    assert {hashlib.sha256(answer.content).digest() for answer in answers} == {hashlib.sha256(audio).digest()}
    assert "Traceback" not in gateway.log.read_text()
