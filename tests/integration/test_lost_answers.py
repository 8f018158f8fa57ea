"""Writes that NATS has stored although its answer never arrived."""

import nats
import pytest

from services.codec_worker.song_record import SongRecord, StoredAudio
from shared.errors import Unavailable
from shared.jobs.store import JobStore
from shared.nats.streams import bootstrap
from shared.schema.job import Decode, Job
from shared.schema.request import GenerateRequest
from shared.settings import Settings


class StoreWithoutAnswers(JobStore):
    """A job store whose writes succeed and whose answers are lost."""

    async def _put(self, job: Job, revision: int) -> None:
        await super()._put(job, revision)
        raise Unavailable("nats", "the answer got lost")


async def test_a_song_that_was_completed_without_an_answer_keeps_its_audio(nats_settings: Settings) -> None:
    client = await nats.connect(nats_settings.nats_url)
    js = client.jetstream()
    await bootstrap(js, nats_settings)
    request = GenerateRequest(lyrics="la", seed=1)
    job = Job(
        job_id="song",
        tenant="local",
        request=request,
        status="decoding",
        created_at=1.0,
        decode=Decode(fencing_token=7),
    )
    await JobStore(js).create(job)
    audio = StoredAudio(key="audio/song/7.flac", size=100, samples=8000, sample_rate=8000, frames=12)
    with pytest.raises(Unavailable):
        await SongRecord(StoreWithoutAnswers(js), job, 7).complete(audio)
    done = await SongRecord(JobStore(js), job, 7).complete(audio)  # as `Retry` repeats it
    assert (done.status, done.audio_key) == ("completed", "audio/song/7.flac")
    await client.close()
