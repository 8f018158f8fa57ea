"""Webhooks, received by a real server."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
import standardwebhooks

from services.gateway.background.webhooks import consumer, delivery, payload, slots
from shared.nats.subjects import FAULTS
from shared.schema.job import Job
from shared.settings import Settings
from tests.integration.gateway_fixtures import SONG, RunningGateway, running_gateway
from tests.integration.webhook_receiver import WORD, Receiver, Songs, end, open_songs, received, receiving, settled


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as found:
        yield found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer, "FIRST_PAUSE", 0.1)


@pytest.fixture
def calling(settings: Settings) -> Settings:
    return replace(settings, webhook_secret=WORD, webhook_private=True)


async def test_the_address_of_a_song_is_called_with_a_signature_that_proves_who_calls(
    calling: Settings, receiver: Receiver
) -> None:
    async with running_gateway(calling, calling.data_dir) as gateway:
        await gateway.submit()  # leaves none
        job_id = await gateway.submit(webhook_url=receiver.url(), title="Ours")
        await gateway.complete(job_id)
        cancelled = await gateway.submit(webhook_url=receiver.url())
        await gateway.http.delete(f"/generate/{cancelled}")
        failed = await gateway.submit(webhook_url=receiver.url())
        await end(gateway, failed, error="no voice")
        bodies = {body["data"]["job_id"]: body for body in await received(receiver, 3)}
        assert {name: body["type"].rpartition(".")[2] for name, body in bodies.items()} == {
            job_id: "completed",
            cancelled: "cancelled",
            failed: "failed",
        }
        done = bodies[job_id]["data"]
        assert (done["result_url"], done["title"], done["status"]) == (
            f"/generate/{job_id}/result",
            "Ours",
            "completed",
        )
        assert bodies[failed]["data"]["error"] == "no voice"
        for headers, body in receiver.got:
            standardwebhooks.Webhook(WORD).verify(body, headers)
            assert headers["host"] == f"127.0.0.1:{receiver.port}"
        await settled(gateway)
        assert len(receiver.got) == 3
        assert 'heartmula_webhooks_total{outcome="delivered"} 3.0' in (await gateway.http.get("/metrics")).text


async def test_a_webhook_that_fails_comes_again_as_the_same(calling: Settings, receiver: Receiver, quick: None) -> None:
    receiver.answers = [b"500 Oops", b"302 Found\r\nLocation: http://127.0.0.1:1/", b"200 OK"]
    async with open_songs(calling) as songs:
        await end(songs, await songs.submit(receiver.url()))
        await received(receiver, 3)
        await settled(songs)
        assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


async def test_an_address_that_answers_410_is_not_called_again(
    calling: Settings, receiver: Receiver, quick: None
) -> None:
    receiver.answers = [b"410 Gone"]
    async with open_songs(calling) as songs:
        job_id = await songs.submit(receiver.url())
        await end(songs, job_id)
        await settled(songs)
        assert len(receiver.got) == 1
        fault = await songs.js.get_last_msg(FAULTS, f"dead.webhook.{job_id}")
        assert (fault.headers or {})["Reason"] == "it answered 410"


async def test_a_webhook_is_given_up_after_a_day(
    calling: Settings, receiver: Receiver, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "GIVE_UP", 1.0)
    receiver.answers = [b"503 Later"] * 100
    async with open_songs(calling) as songs:
        await end(songs, await songs.submit(receiver.url()))
        await settled(songs)
        assert 2 <= len(receiver.got) < 20
        assert songs.outcomes.labels("given_up")._value.get() == 1


async def test_a_retry_after_header_delays_the_next_attempt(calling: Settings, receiver: Receiver, quick: None) -> None:
    receiver.answers = [b"429 Slowly\r\nRetry-After: 2"]
    async with open_songs(calling) as songs:
        await end(songs, await songs.submit(receiver.url()))
        await received(receiver, 1)
        began = time.monotonic()
        await received(receiver, 2)
        assert time.monotonic() - began > 1.5


async def test_a_song_that_ends_while_no_gateway_runs_is_delivered_by_the_next_one(
    calling: Settings, receiver: Receiver
) -> None:
    async with running_gateway(calling, calling.data_dir) as gateway:
        job_id = await gateway.submit(webhook_url=receiver.url())
        await gateway.stop()
        await end(gateway, job_id)
        assert not receiver.got
        await gateway.start()
        (body,) = await received(receiver, 1)
        assert body["data"]["job_id"] == job_id
        await settled(gateway)


async def test_a_gateway_that_is_killed_in_the_middle_leaves_it_to_the_next(
    calling: Settings, receiver: Receiver
) -> None:
    async with running_gateway(calling, calling.data_dir) as gateway:
        await shorter_wait(gateway)
        receiver.hold = asyncio.Event()
        await end(gateway, await gateway.submit(webhook_url=receiver.url()))
        await received(receiver, 1)
        await gateway.stop(signal.SIGKILL)
        receiver.hold.set()
        await gateway.start()
        await shorter_wait(gateway)
        await received(receiver, 2)
        await settled(gateway)


async def shorter_wait(gateway: RunningGateway | Songs) -> None:
    """Redelivery of an unsettled message after two seconds instead of a minute."""
    info = await gateway.js.consumer_info("KV_JOBS", "hooks")
    info.config.ack_wait = 2
    await gateway.js.add_consumer("KV_JOBS", info.config)


async def test_a_receiver_that_hangs_does_not_hold_up_others(
    calling: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "TIMEOUT", 3600.0)  # else the timeout would end them
    slow = Receiver(hold=asyncio.Event())
    server = await asyncio.start_server(slow.handle, "127.0.0.2", 0)
    slow.port = server.sockets[0].getsockname()[1]
    async with open_songs(calling) as songs:
        for _ in range(12):
            await end(songs, await songs.submit(slow.url("127.0.0.2")))
        await end(songs, await songs.submit(receiver.url()))
        await received(receiver, 1)
        assert slow.hold is not None
        slow.hold.set()
        await received(slow, 12)
        assert slow.most_at_once == consumer.HOST_DELIVERIES
        await settled(songs)
    server.close()


async def test_many_hosts_that_hang_do_not_hold_up_others(
    calling: Settings, receiver: Receiver, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More hosts hang than deliveries may run: those that are slow make room, and come again later."""
    monkeypatch.setattr(delivery, "TIMEOUT", 3600.0)  # else the timeout would end them
    monkeypatch.setattr(slots, "SLOW_AFTER", 0.2)
    slow = Receiver(hold=asyncio.Event())
    server = await asyncio.start_server(slow.handle, "127.0.0.2", 0)
    slow.port = server.sockets[0].getsockname()[1]
    resolve_as(monkeypatch, "127.0.0.2")
    hosts = slots.QUICK + slots.SLOW + 20
    async with open_songs(calling) as songs:
        for number in range(hosts):
            await end(songs, await songs.submit(slow.url(f"slow-{number}.example")))
        await end(songs, await songs.submit(receiver.url()))
        await received(receiver, 1)
        assert slow.hold is not None
        slow.hold.set()
        await settled(songs)
        assert songs.outcomes.labels("failed")._value.get() >= 20
        assert songs.outcomes.labels("delivered")._value.get() == hosts + 1
    server.close()


async def test_names_that_cannot_be_looked_up_hold_up_nothing_else(
    calling: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name servers that hang keep threads busy, but none of the threads for the gateway's other work."""
    asked, go_on = threading.Semaphore(0), threading.Event()
    real = socket.getaddrinfo

    def resolve(host: Any, *more: Any, **options: Any) -> Any:
        if str(host).endswith(".example"):
            asked.release()
            go_on.wait()
            raise socket.gaierror("there is no such name")
        return real(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        async with open_songs(calling) as songs:
            for number in range(40):
                await end(songs, await songs.submit(receiver.url(f"lost-{number}.example")))
            await end(songs, await songs.submit(receiver.url("localhost")))
            for _ in range(5):
                await asyncio.to_thread(asked.acquire)
            await received(receiver, 1)
    finally:
        go_on.set()


async def test_every_error_is_counted_and_tried_again(
    calling: Settings, receiver: Receiver, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even an error that no library documents is counted and followed by a pause."""
    real, errors = payload.payload_of, [RuntimeError("strange"), KeyError("stranger")]

    def payload_of(job: Job) -> payload.Payload:
        if errors:
            raise errors.pop()
        return real(job)

    monkeypatch.setattr(payload, "payload_of", payload_of)
    async with open_songs(calling) as songs:
        await end(songs, await songs.submit(receiver.url()))
        await received(receiver, 1)
        await settled(songs)
        assert songs.outcomes.labels("failed")._value.get() == 2
        assert songs.outcomes.labels("delivered")._value.get() == 1


async def test_an_address_that_an_older_version_took_is_given_up(calling: Settings, quick: None) -> None:
    async with open_songs(calling) as songs:
        for url in ("http://8.8.8.010/", "http://exa mple.org/", "nowhere"):
            await end(songs, await songs.submit(url))
        await settled(songs)
        assert songs.outcomes.labels("given_up")._value.get() == 3


async def test_a_name_beyond_ascii_is_called_by_its_ascii_form(
    calling: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_as(monkeypatch, "127.0.0.1")
    async with open_songs(calling) as songs:
        await end(songs, await songs.submit(receiver.url("b\u00fccher.example")))
        await received(receiver, 1)
        assert receiver.got[0][0]["host"] == f"xn--bcher-kva.example:{receiver.port}"


async def test_addresses_that_cannot_be_called_are_refused(settings: Settings) -> None:
    async with running_gateway(replace(settings, webhook_secret=WORD), settings.data_dir) as gateway:
        for url, words in {
            "ftp://example.org/": "https://",
            "https://": "https://",
            "https://example.org:99999/": "https://",
            "https://exa mple.org/": "https://",
            "https://me:word@example.org/": "user",
            "http://127.0.0.1/": "private",
            "http://[::1]:80/": "private",
            "http://[::ffff:10.0.0.1]/": "private",
            "http://169.254.169.254/latest": "private",
            "http://[fec0::1]/": "private",
            "http://[::127.0.0.1]/": "private",
            "http://8.8.8.010/": "Invalid IPv4 address",
            "http://127.1/": "four decimal numbers",
            "http://exa_mple..org/": "neither a name nor an address",
            "https://x/" + "a" * 2_000: "2000",
        }.items():
            answer = await gateway.http.post("/generate", json=SONG | {"webhook_url": url})
            assert (answer.status_code, answer.json().get("field")) == (422, "webhook_url"), url
            assert words in answer.json()["detail"], url
        await gateway.submit(webhook_url="https://example.org/done")
    async with running_gateway(settings, settings.data_dir) as gateway:
        answer = await gateway.http.post("/generate", json=SONG | {"webhook_url": "https://example.org/"})
        assert "HEARTMULA_WEBHOOK_SECRET" in answer.json()["detail"]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "fe80::1%lo", "fd00::1", "64:ff9b::7f00:1", "fec0::1"],
)
async def test_a_name_that_leads_to_a_private_address_is_not_called(
    settings: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    resolve_as(monkeypatch, address)
    async with open_songs(replace(settings, webhook_secret=WORD)) as songs:
        job_id = await songs.submit(receiver.url("rebound.example"))
        await end(songs, job_id)
        await settled(songs)
        assert not receiver.got
        fault = await songs.js.get_last_msg(FAULTS, f"dead.webhook.{job_id}")
        assert (fault.headers or {})["Reason"] == "its address is a private one"


async def test_the_address_that_was_checked_is_the_one_that_is_called(
    calling: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolve_as(monkeypatch, "127.0.0.1")
    async with open_songs(calling) as songs:
        await end(songs, await songs.submit(receiver.url("songs.example")))
        await received(receiver, 1)
        assert receiver.got[0][0]["host"] == f"songs.example:{receiver.port}"
        assert asked() == 1


def resolve_as(monkeypatch: pytest.MonkeyPatch, address: str) -> Callable[[], int]:
    """Resolve names below .example to an address; returns a function that counts their look-ups."""
    real, asked = socket.getaddrinfo, []

    def resolve(host: Any, port: Any, *more: Any, **options: Any) -> Any:
        if str(host).endswith(".example"):
            asked.append(host)
            return [(2, 1, 6, "", (address, port))]
        return real(host, port, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return lambda: len(asked)
