"""Job records and queues on a real server: compare-and-set, ends that stay, one message a song."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import nats
import pytest
from nats.js import JetStreamContext

from shared.errors import JobConflict, QueueFull, Unavailable
from shared.jobs.queues import queue_decode, queue_group, queue_tokens
from shared.jobs.store import ALLOWED, JobStore, change
from shared.nats.streams import bootstrap, streams
from shared.nats.subjects import DEC, TOK
from shared.schema.job import ENDED, Job, Status
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from shared.write_failures import writes_failed


def new_job(job_id: str = "song") -> Job:
    return Job(job_id=job_id, tenant="local", request=GenerateRequest(lyrics="la", seed=1), created_at=time.time())


@pytest.fixture
async def js(nats_settings: Settings) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(nats_settings.nats_url)
    await bootstrap(client.jetstream(), nats_settings)
    yield client.jetstream()
    await client.close()


async def test_bootstrap_may_run_again_and_changes_what_may_be_changed(
    js: JetStreamContext, nats_settings: Settings
) -> None:
    await asyncio.gather(*(bootstrap(js, nats_settings) for _ in range(3)))
    await bootstrap(js, replace(nats_settings, queue_limit=7))
    info = await js.stream_info(TOK)
    assert info.config.max_msgs == 7
    assert {s.config.name for s in await js.streams_info()} == {s.name for s in streams(1)}


async def test_a_record_is_created_once_and_read_back(js: JetStreamContext) -> None:
    store = JobStore(js)
    job = new_job()
    await store.create(job)
    with pytest.raises(JobConflict):
        await store.create(job)
    assert await store.get("song") == job
    assert await store.get("other") is None
    await store.delete(job)
    assert await store.get("song") is None


async def test_a_record_is_created_over_one_that_was_deleted_or_is_void_and_by_one_writer_alone(
    js: JetStreamContext,
) -> None:
    store, job = JobStore(js), new_job()

    async def failed(known: Job) -> bool:
        return known.status == "failed"

    async def create(number: float) -> bool:
        try:
            await store.create_over(msgspec.structs.replace(job, created_at=number), failed)
        except JobConflict:
            return False
        return True

    for number, void in enumerate(("nothing", "failed", "deleted")):
        if void == "failed":
            await store.update("song", "local", lambda found: change(found, status="failed"))
        elif void == "deleted":
            await store.delete(job)
        created = await asyncio.gather(*(create(10 * number + writer) for writer in range(5)))
        assert sum(created) == 1, void
        found = await store.get("song")
        assert found is not None
        assert (found.status, found.created_at) == ("queued", 10 * number + created.index(True))
        assert not await create(99)  # over one that waits


async def test_concurrent_changes_are_all_applied(js: JetStreamContext) -> None:
    store = JobStore(js)
    await store.create(new_job())
    await asyncio.gather(
        *(store.update("song", "local", lambda job: change(job, attempts=job.attempts + 1)) for _ in range(20))
    )
    job = await store.get("song")
    assert job is not None
    assert job.attempts == 20


async def test_a_song_is_queued_once_and_a_full_queue_takes_no_other(
    js: JetStreamContext, nats_settings: Settings
) -> None:
    nc = js._nc
    await bootstrap(js, replace(nats_settings, queue_limit=3))
    first, *others = (new_job(name) for name in ("first", "second", "third", "fourth"))
    assert (await queue_tokens(nc, first)) is not None
    assert (await queue_tokens(nc, first)) is None
    assert (await queue_group(nc, [others[0], first])) is None
    assert (await js.stream_info(TOK)).state.messages == 1
    with pytest.raises(QueueFull):
        await queue_group(nc, others)
    assert (await queue_group(nc, others[:2])) == [2, 3]
    with pytest.raises(QueueFull):
        await queue_tokens(nc, others[2])


async def test_a_queue_that_cannot_be_reached_is_an_error(js: JetStreamContext) -> None:
    await js.delete_stream(DEC)
    failed = writes_failed()
    with pytest.raises(Unavailable, match=r"^NATS does not answer: JetStream does not answer$"):
        await queue_decode(js._nc, new_job(), "tokens/song/1.safetensors", 5)
    assert writes_failed() == failed + 1


async def test_of_many_ends_exactly_one_wins(js: JetStreamContext) -> None:
    store = JobStore(js)
    await store.create(new_job())

    async def end(status: Status) -> Status | None:
        try:
            return (await store.update("song", "local", lambda job: change(job, status=status))).status
        except JobConflict:
            return None

    ends = [end("cancelled") if n % 2 else end("failed") for n in range(10)]
    won = [status for status in await asyncio.gather(*ends) if status]
    job = await store.get("song")
    assert job is not None
    assert won == [job.status]
    assert job.completed_at is not None


def test_an_ended_song_never_changes_again() -> None:
    for end in ENDED:
        assert ALLOWED[end] == frozenset()
