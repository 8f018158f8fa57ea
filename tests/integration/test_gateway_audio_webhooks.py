"""Webhooks about the first audio of songs that are being made."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import standardwebhooks

from services.gateway.background.webhooks import audio_webhook, consumer
from shared.nats.subjects import TENANT
from shared.settings import Settings
from tests.integration.gateway_fixtures import SONG, eventually, running_gateway
from tests.integration.webhook_receiver import WORD, Receiver, end, open_songs, received, receiving, settled


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


def kinds(receiver: Receiver) -> list[str]:
    """The types of all calls, in the order in which they came."""
    return [json.loads(body)["type"].removeprefix("heartmula.song.") for _, body in receiver.got]


@pytest.mark.parametrize("how", ["http", "nats"])
async def test_the_first_audio_of_a_song_is_reported_once(calling: Settings, receiver: Receiver, how: str) -> None:
    asked = SONG | {"webhook_url": receiver.url(), "webhook_events": ["ended", "audio"], "title": "Ours"}
    async with running_gateway(calling, calling.data_dir) as gateway:
        if how == "http":
            job_id = await gateway.submit(**asked)
        else:
            answer = await gateway.nc.request(f"submit.{TENANT}", json.dumps(asked).encode(), timeout=10)
            job_id = json.loads(answer.data)["job_id"]
        await gateway.move_to(job_id, "generating")
        await gateway.decode_window(job_id)
        (body,) = await received(receiver, 1)
        assert (body["type"], body["data"]) == (
            "heartmula.song.audio",
            {
                "job_id": job_id,
                "status": "generating",
                "created_at": body["data"]["created_at"],
                "playable_seconds": 25.6,
                "stream_url": f"/generate/{job_id}/stream",
                "title": "Ours",
                "seed": (await gateway.job(job_id)).request.seed,
            },
        )
        await settled(gateway)
        await gateway.decode_window(job_id)
        await settled(gateway)
        await gateway.complete(job_id)
        await received(receiver, 2)
        await settled(gateway)
        assert kinds(receiver) == ["audio", "completed"]
        assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 2
        for headers, data in receiver.got:
            standardwebhooks.Webhook(WORD).verify(data, headers)
        # What a version cannot read that does not know the field must not hold it.
        record = await gateway.js.get_last_msg("KV_JOBS", f"$KV.JOBS.{TENANT}.{job_id}")
        assert "webhook_events" not in json.loads(record.data or b"")["request"]


async def test_an_address_is_called_about_what_it_asked_for_alone(calling: Settings, receiver: Receiver) -> None:
    async with open_songs(calling) as songs:
        for events in (("ended",), ("audio",)):
            job_id = await songs.submit(receiver.url(), *events)
            await songs.decode(job_id)
            await settled(songs)
            await end(songs, job_id)
            await settled(songs)
        assert kinds(receiver) == ["failed", "audio"]


async def test_a_webhook_about_audio_that_fails_comes_again_as_the_same(
    calling: Settings, receiver: Receiver, quick: None
) -> None:
    receiver.answers = [b"500 Oops", b"503 Later"]
    async with open_songs(calling) as songs:
        job_id = await songs.submit(receiver.url(), "ended", "audio")
        await songs.decode(job_id)
        await received(receiver, 3)
        await settled(songs)
        await songs.decode(job_id, 2)
        await settled(songs)
        await end(songs, job_id)
        await settled(songs)
        assert kinds(receiver) == ["audio", "audio", "audio", "failed"]
        assert len({headers["webhook-id"] for headers, _ in receiver.got[:3]}) == 1
        assert len({json.loads(body)["timestamp"] for _, body in receiver.got[:3]}) == 1


async def test_an_address_that_answers_410_about_audio_is_called_at_the_end_alone(
    calling: Settings, receiver: Receiver, quick: None
) -> None:
    receiver.answers = [b"410 Gone"]
    async with open_songs(calling) as songs:
        job_id = await songs.submit(receiver.url(), "ended", "audio")
        await songs.decode(job_id)
        await settled(songs)
        await songs.decode(job_id, 2)
        await settled(songs)
        await end(songs, job_id)
        await settled(songs)
        assert kinds(receiver) == ["audio", "failed"]


async def test_audio_is_not_reported_after_the_end(
    calling: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A song ends while its audio is still to be reported again."""
    monkeypatch.setattr(consumer, "FIRST_PAUSE", 3600.0)
    monkeypatch.setattr(audio_webhook, "LONGEST_ATTEMPT", 2.0)
    receiver.answers = [b"500 Oops"]
    async with open_songs(calling) as songs:
        job_id = await songs.submit(receiver.url(), "ended", "audio")
        await songs.decode(job_id)
        await received(receiver, 1)
        await end(songs, job_id)
        await settled(songs)
        assert kinds(receiver) == ["audio", "failed"]


async def test_audio_that_waited_for_its_turn_until_the_end_is_not_reported(
    calling: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "HOST_DELIVERIES", 1)
    receiver.hold = asyncio.Event()
    async with open_songs(calling) as songs:
        await end(songs, await songs.submit(receiver.url()))
        await received(receiver, 1)
        job_id = await songs.submit(receiver.url(), "ended", "audio")
        await songs.decode(job_id)

        async def waits() -> bool:
            return (job_id, "audio") in songs.hooks._tasks

        await eventually(waits, "the audio is not about to be reported")
        await end(songs, job_id, "decoding")
        await end(songs, job_id, "completed", duration_s=30.0)
        receiver.hold.set()
        await settled(songs)
        assert kinds(receiver) == ["failed", "completed"]


async def test_gateways_report_the_audio_of_a_song_one_at_a_time(calling: Settings, receiver: Receiver) -> None:
    """Two of them may have a change of the record each."""
    async with open_songs(replace(calling, webhook_secret="")) as songs:  # delivers nothing by itself
        job_id = await songs.submit(receiver.url(), "audio")
        await songs.decode(job_id)
        job = await songs.jobs.get(job_id)
        assert job is not None
        assert await audio_webhook.begin(songs.jobs, job) is not None
        assert await audio_webhook.begin(songs.jobs, job) is None


async def test_the_end_waits_for_an_attempt_that_may_be_under_way(
    calling: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_webhook, "LONGEST_ATTEMPT", 2.0)
    receiver.hold = asyncio.Event()
    async with open_songs(calling) as songs:
        job_id = await songs.submit(receiver.url(), "ended", "audio")
        await songs.decode(job_id)
        await received(receiver, 1)
        ended = await end(songs, job_id)
        assert ended.audio_webhook is not None
        assert ended.audio_webhook.again is not None
        await received(receiver, 2)
        receiver.hold.set()
        await settled(songs)
        assert set(kinds(receiver)[:-1]) == {"audio"}
        assert kinds(receiver)[-1] == "failed"
        assert receiver.came[-1] >= ended.audio_webhook.again


async def test_a_gateway_that_dies_while_it_reports_audio_leaves_it_to_another(
    calling: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_webhook, "LONGEST_ATTEMPT", 2.0)
    receiver.hold = asyncio.Event()
    async with open_songs(calling) as dying:
        job_id = await dying.submit(receiver.url(), "audio")
        await dying.decode(job_id)
        await received(receiver, 1)  # its attempt is broken off, and nothing of it is recorded
    receiver.hold.set()
    async with open_songs(calling) as songs:
        await received(receiver, 2)
        await settled(songs)
        assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
        job = await songs.jobs.get(job_id)
        assert job is not None
        assert job.audio_webhook is not None
        assert job.audio_webhook.again is None


async def test_two_gateways_report_audio_once(calling: Settings, receiver: Receiver) -> None:
    async with open_songs(calling) as songs, open_songs(calling):
        for _ in range(8):
            await songs.decode(await songs.submit(receiver.url(), "audio"))
        await received(receiver, 8)
        await settled(songs)
        assert len(receiver.got) == 8
