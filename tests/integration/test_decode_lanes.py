"""The two lanes of the queue for audio: songs with listeners go first, and the others are never starved."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import nats
import pytest
from nats.aio.client import Client

from services.codec_worker.stage import SPEC
from shared.jobs.events import EventPublisher
from shared.jobs.queues import queue_windows
from shared.jobs.store import JobStore
from shared.nats.streams import bootstrap
from shared.schema.job import Job
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from shared.worker.draining import Draining
from shared.worker.job_consumer import JobConsumer
from shared.worker.turn_policy import HIGH_IN_A_ROW
from tests.integration.flow import PATIENCE


class Queue:
    """A consumer of the codec's queue, and songs in it."""

    def __init__(self, nc: Client) -> None:
        self.nc, self.jobs = nc, JobStore(nc.jetstream())
        self.wake = wake = asyncio.Event()
        settlement: Any = None
        self.consumer = JobConsumer(
            nc,
            nc.jetstream(),
            SPEC,
            settlement,
            jobs=self.jobs,
            events=EventPublisher(nc.jetstream()),
            ack_wait=60,
            draining=Draining(wake),
            wake=wake,
            in_hand=lambda _: False,
            count_progress=lambda: None,
        )

    async def put(self, name: str, *, listened: bool) -> None:
        """Put a song into a lane."""
        job = Job(
            job_id=name,
            tenant="local",
            request=GenerateRequest(lyrics="la"),
            created_at=1.0,
            status="generating",
            fencing_token=3,
            tokens_key=f"tokens/{name}/3.safetensors",
            saved_frames=400,
        )
        await self.jobs.create(job)
        assert await queue_windows(self.nc, job, listened=listened) is not None

    async def next(self) -> Job | None:
        """Claim the next song, and be done with it."""
        turn: Any = SimpleNamespace(fencing_token=9)
        context = await self.consumer.next(turn)
        if context is None:
            return None
        await context.message.acknowledge()
        await context.close()
        return context.job


@pytest.fixture
async def queue(nats_settings: Settings) -> AsyncIterator[Queue]:
    client = await nats.connect(nats_settings.nats_url)
    await bootstrap(client.jetstream(), nats_settings)
    yield Queue(client)
    await client.close()


async def test_songs_with_listeners_go_first_and_others_get_every_fifth_place(queue: Queue) -> None:
    for number in range(10):
        await queue.put(f"other-{number}", listened=False)
    for number in range(10):
        await queue.put(f"heard-{number}", listened=True)
    order = []
    while job := await queue.next():
        order.append(job.job_id.partition("-")[0])
        assert job.decode is not None
        assert job.decode.lane == ("high" if order[-1] == "heard" else "normal")
        assert (job.status, job.fencing_token, job.decode.fencing_token) == ("generating", 3, 9)
    turns = ["heard"] * HIGH_IN_A_ROW + ["other"]
    assert order == turns * 2 + ["heard"] * 2 + ["other"] * 8


@pytest.mark.parametrize("listened", [False, True])
async def test_a_worker_that_waits_sees_a_song_in_either_lane(queue: Queue, listened: bool) -> None:
    """Also where it is not notified."""
    waiting = asyncio.create_task(queue.consumer.wait())
    await queue.put("song", listened=listened)
    async with asyncio.timeout(PATIENCE):
        await waiting
    assert await queue.next() is not None
    assert await queue.next() is None


async def test_a_song_with_a_listener_goes_first_though_its_lane_was_empty_just_now(queue: Queue) -> None:
    await queue.consumer.open()
    for number in range(3):
        await queue.put(f"other-{number}", listened=False)
    first = await queue.next()
    queue.wake.clear()
    await queue.put("heard", listened=True)
    async with asyncio.timeout(PATIENCE):
        await queue.wake.wait()  # it is announced
    second = await queue.next()
    assert first is not None
    assert second is not None
    assert (first.job_id, second.job_id) == ("other-0", "heard")
