"""Queue position and ETA of a waiting song: over HTTP, in events, and over a websocket."""

import time
from datetime import datetime
from typing import Any

import msgspec

from deploy.local.servers.embedded import NatsServer
from shared.nats.streams import purge_job
from shared.nats.subjects import TOK, token_subject
from shared.schema.event import CloudEvent, Progress, Queued
from shared.settings import Settings
from tests.integration.gateway_fixtures import SONG, RunningGateway, eventually, running_gateway


async def state(gateway: RunningGateway, job_id: str) -> dict[str, Any]:
    body: dict[str, Any] = (await gateway.http.get(f"/generate/{job_id}/status")).json()
    return body


async def at(gateway: RunningGateway, job_id: str, position: int | None) -> dict[str, Any]:
    """Wait until a song has this queue position, and return its state; an answer may be a second old."""

    async def ask() -> dict[str, Any] | None:
        body = await state(gateway, job_id)
        return body if body.get("queue_position") == position else None

    found: dict[str, Any] = await eventually(ask, f"the song never came to place {position}")
    return found


def seconds_from_now(eta: str) -> float:
    return datetime.fromisoformat(eta).timestamp() - time.time()


async def begin(gateway: RunningGateway, job_id: str) -> None:
    await gateway.move_to(job_id, "generating", started_at=time.time())


async def finish_tokens(gateway: RunningGateway, job_id: str) -> None:
    """Remove a song's message from the queue, as its worker does."""
    await gateway.move_to(job_id, "generating", "decoding")
    await purge_job(gateway.js, job_id)


async def test_the_place_of_a_song_is_the_number_of_songs_before_it(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        songs = [await gateway.submit() for _ in range(4)]
        high = [await gateway.submit(priority="high") for _ in range(2)]
        for position, job_id in enumerate(high):
            await at(gateway, job_id, position)
        for position, job_id in enumerate(songs):
            assert "eta" not in await at(gateway, job_id, position + 2)  # no rate was measured

        await begin(gateway, high[0])
        await at(gateway, high[0], None)  # it is being made
        await at(gateway, songs[0], 2)  # and still comes first
        await finish_tokens(gateway, high[0])
        await at(gateway, songs[0], 1)
        assert (await gateway.http.delete(f"/generate/{songs[1]}")).status_code == 200
        await at(gateway, songs[1], None)
        await at(gateway, songs[0], 1)
        await at(gateway, songs[3], 3)
        await finish_tokens(gateway, high[1])
        await at(gateway, songs[0], 0)
        await at(gateway, songs[3], 2)

        # A song that is put into the queue again goes to its end.
        message = await gateway.js.get_msg(TOK, subject=token_subject("normal", songs[0]))
        await purge_job(gateway.js, songs[0])
        await at(gateway, songs[0], None)
        await at(gateway, songs[2], 0)
        await gateway.js.publish(token_subject("normal", songs[0]), message.data or b"")
        await at(gateway, songs[0], 2)


async def test_place_and_eta_of_a_song_when_it_is_accepted(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        await gateway.heartbeat("tokenizer", rate=10.0, song_frames=20.0)
        await gateway.heartbeat("codec", rate=100.0)

        async def noticed() -> bool:  # the gateway may have read the heartbeats just before these came
            return bool((await gateway.http.get("/health")).json()["workers"] == {"tokenizer": 1, "codec": 1})

        await eventually(noticed, "the workers' heartbeats are not noticed")
        await gateway.submit()
        await gateway.submit()
        answer = await gateway.http.post("/generate", json=SONG)  # 50 frames
        body = answer.json()
        assert body["queue_position"] == 2
        # (2 × 20 + 50) frames at 10 and at 100 a second: 9.9 s. The clock of this test runs on.
        assert 0 < seconds_from_now(body["eta"]) <= 9.9
        assert body["eta"].endswith("Z")
        stored = await gateway.event(body["job_id"], "queued")
        event = msgspec.json.decode(stored.data or b"", type=CloudEvent).data
        assert isinstance(event, Queued)
        assert (event.queue_position, event.eta) == (2, body["eta"])


async def test_a_waiting_client_receives_an_event_when_its_song_moves_up(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        first, second, third = [await gateway.submit() for _ in range(3)]
        async with gateway.watch(third) as watcher:
            snapshot = await watcher.frame()
            assert snapshot["queue_position"] == 2
            await finish_tokens(gateway, first)
            frame = await watcher.frame()
            assert frame["type"] == "heartmula.song.queued"
            assert (frame["id"], frame["data"]["queue_position"], frame["data"]["eta"]) == (snapshot["id"], 1, None)
            assert frame["data"]["status"] == "queued"
            # Now there are rates: a time of completion can be estimated.
            await gateway.heartbeat("tokenizer", rate=0.1, song_frames=50.0)
            await gateway.heartbeat("codec", rate=100.0)
            frame = await watcher.frame()
            assert frame["data"]["queue_position"] == 1
            before = frame["data"]["eta"]
            assert before is not None
            await gateway.heartbeat("tokenizer", rate=0.01, song_frames=50.0)
            assert (await watcher.frame())["data"]["eta"] > before
            await finish_tokens(gateway, second)
            assert (await watcher.frame())["data"]["queue_position"] == 0
            await gateway.move_to(third, "generating")
            await gateway.stage(third)
            assert (await watcher.frame())["type"] == "heartmula.song.stage"
            await gateway.complete(third)
            frames, code = await watcher.rest()
            assert ([frame["type"] for frame in frames], code) == (["heartmula.song.completed"], 1000)


async def test_progress_says_when_the_song_will_be_ready(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        job_id = await gateway.submit()
        async with gateway.watch(job_id) as watcher:
            await watcher.frame()
            await gateway.move_to(job_id, "generating")
            progress = Progress(job_id=job_id, status="generating", progress=40, done=20, total=50, rate=0.5)
            await gateway.publish(progress)
            assert (await watcher.frame())["data"]["eta"] is None  # the rate of the codec is not known
            await gateway.heartbeat("codec", rate=1.0)
            assert "eta" in await eventually(lambda: with_eta(gateway, job_id), "no time of completion")
            await gateway.publish(progress)
            # 30 frames at 0.5 a second, then 50 at 1 a second
            assert 60 < seconds_from_now((await watcher.frame())["data"]["eta"]) <= 110
            assert 60 < seconds_from_now((await state(gateway, job_id))["eta"]) <= 110
            await gateway.decode_window(job_id, 3.2)  # 40 frames of its audio
            assert (await watcher.frame())["type"] == "heartmula.song.audio"
            await gateway.publish(progress)
            assert seconds_from_now((await watcher.frame())["data"]["eta"]) <= 70
            assert seconds_from_now((await state(gateway, job_id))["eta"]) <= 70
            await gateway.move_to(job_id, "decoding", frames=60)
            assert seconds_from_now((await state(gateway, job_id))["eta"]) <= 20
            await gateway.move_to(job_id, "decoding", frames=20, decode=None)  # it ended early
            assert seconds_from_now((await state(gateway, job_id))["eta"]) <= 20
            await gateway.publish(Progress(job_id=job_id, status="decoding", progress=90, done=3, total=4))
            assert seconds_from_now((await watcher.frame())["data"]["eta"]) <= 5
            assert seconds_from_now((await state(gateway, job_id))["eta"]) <= 5
            await gateway.complete(job_id)
            assert (await watcher.rest())[1] == 1000
        assert "eta" not in await state(gateway, job_id)


async def with_eta(gateway: RunningGateway, job_id: str) -> dict[str, Any] | None:
    body = await state(gateway, job_id)
    return body if body.get("eta") else None


async def test_an_end_without_an_event_is_found_in_the_record(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        done, failed = await gateway.submit(seed=3), await gateway.submit()
        async with gateway.watch(done) as one, gateway.watch(failed) as two:
            await one.frame(), await two.frame()
            # Their workers die between the record and the event.
            await gateway.move_to(done, "generating", "decoding", "completed", duration_s=4.0)
            await gateway.move_to(failed, "failed", error="the model said no")
            frames, code = await one.rest()
            assert code == 1000
            assert frames[-1]["type"] == "heartmula.song.completed"
            assert frames[-1]["data"] == {
                "kind": "completed",
                "job_id": done,
                "status": "completed",
                "progress": 100,
                "result_url": f"/generate/{done}/result",
                "duration_s": 4.0,
                "format": "flac",
                "seed": 3,
            }
            frames, code = await two.rest()
            assert (frames[-1]["data"]["error"], code) == ("the model said no", 1000)


async def test_places_are_known_again_after_the_broker_restarts(settings: Settings, nats_server: NatsServer) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        await gateway.submit()
        second = await gateway.submit()
        await nats_server.stop()
        await nats_server.start()

        async def known() -> bool:
            return (await state(gateway, second)).get("queue_position") == 1

        await eventually(known, "the place of a song was not known again")
