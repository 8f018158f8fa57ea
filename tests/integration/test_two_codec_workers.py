"""A song that waits in both lanes of the queue for audio, or has two workers at it: nothing of it is lost."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared.jobs.claims import with_claim
from shared.jobs.events import EventPublisher
from shared.jobs.store import change
from shared.nats.subjects import DEC, TENANT
from shared.schema.job import Job
from shared.settings import Settings
from shared.worker.job_settlement import JobSettlement
from tests.integration.flow import Flow, open_flow
from tests.integration.song_being_made import SongBeingMade

FRAMES = 190


@pytest.fixture
async def flow(settings: Settings) -> AsyncIterator[Flow]:
    async with open_flow(settings) as flow:
        yield flow


def settlement(flow: Flow) -> JobSettlement:
    return JobSettlement(
        flow.js._nc, flow.js, "codec", jobs=flow.jobs, events=EventPublisher(flow.js), store=flow.store
    )


class Message:
    """A message in the hands of a worker."""

    data = b"{}"
    acknowledged = False

    async def acknowledge(self) -> None:
        self.acknowledged = True

    async def discard(self) -> None:
        self.acknowledged = True


async def test_a_completed_song_keeps_its_audio_when_another_worker_gives_it_up(flow: Flow) -> None:
    await flow.worker("codec")
    song = await SongBeingMade.begin(flow, FRAMES)
    await song.end()
    await flow.ended(song.job_id)
    await flow.until_empty(DEC)
    stored = await song.objects()
    message: Any = Message()
    await settlement(flow).fail(message, song.job_id, TENANT, "its worker died 5 times while working on it")
    assert (await song.record()).status == "completed"
    assert await song.objects() == stored
    assert message.acknowledged


async def test_a_song_that_could_not_be_queued_while_a_worker_held_its_message_is_queued_by_it(flow: Flow) -> None:
    song = await SongBeingMade.begin(flow, FRAMES)
    await song.end(queue=False)

    def claimed_by_the_other_lane(job: Job) -> Job:
        return with_claim(job, "codec", claim={"fencing_token": 99, "lane": "high"}, status="decoding", frames=FRAMES)

    job = await flow.jobs.update(song.job_id, TENANT, claimed_by_the_other_lane)

    class Context:
        message = Message()

        def superseded(self, _: Job) -> bool:
            return True

    context: Any = Context()
    await settlement(flow).leave(context, job)
    assert context.message.acknowledged
    assert (await flow.js.stream_info(DEC)).state.messages == 1
    await flow.worker("codec")
    assert (await flow.ended(song.job_id)).status == "completed"


async def test_a_message_about_tokens_that_were_lost_leaves_those_alone_that_are_made_again(flow: Flow) -> None:
    song = await SongBeingMade.begin(flow, FRAMES)
    await song.end()
    await song.queue(listened=True)
    await flow.store.delete_one(song.key)
    await flow.jobs.update(
        song.job_id, TENANT, lambda job: change(job, status="queued", tokens_key=None, frames=None, remade=1)
    )
    await flow.jobs.update(song.job_id, TENANT, lambda job: change(job, status="generating", fencing_token=99))
    await flow.worker("codec")
    await flow.until_empty(DEC)
    job = await song.record()
    assert (job.status, job.remade, job.fencing_token) == ("generating", 1, 99)
