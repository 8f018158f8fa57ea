"""A song's events over a websocket."""

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
import websockets

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.auth.api_keys import Caller
from shared.nats.subjects import EVENTS
from shared.schema.event import Audio, Failed, Queued, Stage
from shared.settings import Settings
from tests.integration.gateway_fixtures import RunningGateway, eventually, fresh_settings, in_process, running_gateway

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-socket")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


async def test_a_client_sees_a_snapshot_then_every_event_then_the_end(gateway: RunningGateway) -> None:
    job_id = await gateway.submit(title="Song", seed=3)
    async with gateway.watch(job_id) as watcher:
        snapshot = await watcher.frame()
        state = (await gateway.http.get(f"/generate/{job_id}/status")).json()
        assert snapshot == state | {"type": "snapshot", "id": snapshot["id"]}
        await gateway.move_to(job_id, "generating")
        await gateway.stage(job_id)
        await gateway.progress(job_id, 40)
        await gateway.progress(job_id, 10)  # begun again elsewhere
        await gateway.complete(job_id)
        frames, code = await watcher.rest()
    assert code == 1000
    kinds = [frame["type"].removeprefix("heartmula.song.") for frame in frames]
    assert kinds == ["stage", "progress", "progress", "completed"]
    assert [frame["data"]["progress"] for frame in frames] == [0, 40, 40, 100]
    ids = [int(frame["id"]) for frame in frames]
    assert ids == sorted(set(ids))
    assert ids[0] > int(snapshot["id"])
    assert {frame["specversion"] for frame in frames} == {"1.0"}
    assert frames[-1]["data"]["result_url"] == f"/generate/{job_id}/result"


async def test_a_client_learns_how_much_can_be_heard(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    async with gateway.watch(job_id) as watcher:
        first = await watcher.frame()
        assert first["playable_seconds"] == 0
        await gateway.move_to(job_id, "generating")
        await gateway.progress(job_id, 40)
        await gateway.decode_window(job_id)
        await gateway.decode_window(job_id)
        frames = [await watcher.frame() for _ in range(3)]
        assert [frame["type"] for frame in frames[1:]] == ["heartmula.song.audio"] * 2
        assert [frame["data"]["playable_seconds"] for frame in frames[1:]] == [25.6, 51.2]
        assert [frame["data"]["progress"] for frame in frames] == [40, 40, 40]  # audio is no step back
        state = (await gateway.http.get(f"/generate/{job_id}/status")).json()
        assert (state["playable_seconds"], state["progress"], state["status"]) == (51.2, 40, "generating")
        await gateway.move_to(job_id, "decoding", frames=700)
        await gateway.publish(Stage(job_id=job_id, status="decoding", progress=80, stage="waiting"))
        # What the codec sends may have been made before the last token.
        await gateway.publish(Audio(job_id=job_id, status="generating", progress=0, playable_seconds=51.2))
        frames = [await watcher.frame() for _ in range(2)]
        assert [(frame["data"]["status"], frame["data"]["progress"]) for frame in frames] == [("decoding", 80)] * 2
    async with gateway.watch(job_id, after=first["id"]) as watcher:
        assert (await watcher.frame())["playable_seconds"] == 51.2
        missed = [await watcher.frame() for _ in range(5)]
        assert [event["data"].get("playable_seconds") for event in missed] == [None, 51.2, 51.2, None, 51.2]
    await gateway.complete(job_id)
    assert (await gateway.http.get(f"/generate/{job_id}")).json()["playable_seconds"] == 4


async def test_a_client_that_comes_back_gets_what_it_missed_once(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    async with gateway.watch(job_id) as watcher:
        first = await watcher.frame()
    await gateway.move_to(job_id, "generating")
    for percent in (10, 20, 30):
        await gateway.progress(job_id, percent)
    async with gateway.watch(job_id, after=first["id"]) as watcher:
        snapshot = await watcher.frame()
        assert (snapshot["type"], snapshot["status"], snapshot["progress"]) == ("snapshot", "generating", 30)
        missed = [await watcher.frame() for _ in range(3)]
        assert [frame["data"]["done"] for frame in missed] == [10, 20, 30]
        assert {frame["data"]["progress"] for frame in missed} == {30}
        assert missed[-1]["id"] == snapshot["id"]
        await gateway.progress(job_id, 50)
        assert (await watcher.frame())["data"]["progress"] == 50
        await gateway.complete(job_id)
        assert (await watcher.frame())["type"] == "heartmula.song.completed"
        assert await watcher.closed() == 1000


async def test_the_end_of_an_ended_song_is_sent_at_once(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    await gateway.complete(job_id)
    async with gateway.watch(job_id) as watcher:
        frames, code = await watcher.rest()
    assert ([frame["type"] for frame in frames], code) == (["snapshot"], 1000)
    assert frames[0]["progress"] == 100
    async with gateway.watch(job_id, after=0) as watcher:
        frames, code = await watcher.rest()
    kinds = [frame["type"].removeprefix("heartmula.song.") for frame in frames]
    assert (kinds, code) == (["snapshot", "queued", "completed"], 1000)


async def test_a_song_that_fails_or_is_cancelled_keeps_its_progress(gateway: RunningGateway) -> None:
    failed, cancelled = await gateway.submit(), await gateway.submit()
    async with gateway.watch(failed) as first, gateway.watch(cancelled) as second:
        for job_id, watcher in ((failed, first), (cancelled, second)):
            await watcher.frame()
            await gateway.move_to(job_id, "generating")
            await gateway.progress(job_id, 30)
            assert (await watcher.frame())["data"]["progress"] == 30
        await gateway.move_to(failed, "failed", error="no")
        await gateway.publish(Failed(job_id=failed, status="failed", progress=0, error="no"))
        assert (await gateway.http.delete(f"/generate/{cancelled}")).status_code == 200
        for watcher, kind in ((first, "failed"), (second, "cancelled")):
            frame = await watcher.frame()
            assert (frame["type"], frame["data"]["progress"]) == (f"heartmula.song.{kind}", 30)
            assert await watcher.closed() == 1000


@pytest.mark.parametrize("job_id", [UNKNOWN, "x", "*", "%3E", "a.b"])
async def test_an_unknown_song_closes_with_4404(gateway: RunningGateway, job_id: str) -> None:
    async with gateway.watch(job_id) as watcher:
        assert await watcher.closed() == 4404


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "9" * 30, "%00"])
async def test_an_id_that_is_none_is_refused(gateway: RunningGateway, after: str) -> None:
    job_id = await gateway.submit()
    async with gateway.watch(job_id, after=after) as watcher:
        assert await watcher.closed() == 1008


async def test_events_of_other_songs_are_not_sent(gateway: RunningGateway) -> None:
    mine, other = await gateway.submit(), await gateway.submit()
    async with gateway.watch(mine) as watcher:
        await watcher.frame()
        await gateway.complete(other)
        await gateway.complete(mine)
        frames, _ = await watcher.rest()
    assert {frame["subject"] for frame in frames} == {mine}


async def test_two_gateways_send_the_same_events(gateway: RunningGateway) -> None:
    async with running_gateway(gateway.settings, gateway.log.parent) as second:
        job_id = await gateway.submit()
        async with gateway.watch(job_id) as one, second.watch(job_id) as two:
            await one.frame(), await two.frame()
            await gateway.progress(job_id, 5)
            await gateway.complete(job_id)
            assert await one.rest() == await two.rest()
        assert (await second.http.get(f"/generate/{job_id}/status")).json()["status"] == "completed"


async def test_a_stopped_gateway_says_come_back_and_ends_cleanly(gateway: RunningGateway) -> None:
    async with running_gateway(gateway.settings, gateway.log.parent) as second:
        job_id = await gateway.submit()
        async with second.watch(job_id) as watcher:
            await watcher.frame()
            second.process.send_signal(signal.SIGTERM)
            assert await watcher.closed() == 1012
        assert await second.process.wait() == 0


async def test_nothing_is_lost_while_the_broker_restarts(settings: Settings, nats_server: NatsServer) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        job_id = await gateway.submit()
        async with gateway.watch(job_id) as watcher:
            await watcher.frame()
            await gateway.progress(job_id, 10)
            assert (await watcher.frame())["data"]["progress"] == 10
            await nats_server.stop()
            await nats_server.start()

            async def back() -> bool:
                return gateway.nc.is_connected

            await eventually(back, "the test did not get its connection back")
            for percent in (20, 30):
                await gateway.progress(job_id, percent)
            assert [(await watcher.frame())["data"]["progress"] for _ in range(2)] == [20, 30]
            await gateway.complete(job_id)
            assert (await watcher.rest())[1] == 1000


async def test_clients_that_vanish_leave_nothing_behind(settings: Settings) -> None:
    before = asyncio.all_tasks()
    async with in_process(settings) as (gateway, _, base):
        answer = await gateway.submission.submit(Caller("local"), b'{"lyrics": "la"}')
        url = f"{base.replace('http', 'ws', 1)}/generate/{answer.job.job_id}/events"
        idle = len(asyncio.all_tasks())
        for _ in range(4):
            clients = await asyncio.gather(*(websockets.connect(url, proxy=None) for _ in range(50)))
            await asyncio.gather(*(client.recv() for client in clients))
            for client in clients:
                client.transport.abort()
            await gateway.events.publish("local", Queued(job_id=answer.job.job_id, status="queued", progress=0))
            await asyncio.gather(*(client.wait_closed() for client in clients))

        async def forgotten() -> bool:
            # The gateway's own tasks come and go; one left behind by every client would be 200.
            return gateway.broadcaster.subscriptions == 0 and len(asyncio.all_tasks()) < idle + 25

        await eventually(forgotten, "listeners or tasks are left of 200 clients")

        async def few_consumers() -> bool:
            # One for all clients of a gateway; the other gateway of this module follows the new stream too.
            return (await gateway.js.stream_info(EVENTS)).state.consumer_count <= 2

        await eventually(few_consumers, "there are more consumers than gateways")
    assert asyncio.all_tasks() <= before
