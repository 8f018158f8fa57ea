"""Writes that NATS has on disk although its answer never arrived."""

from types import SimpleNamespace
from typing import Any

import nats
import pytest

from services.codec_worker.engines.trivial import TrivialCodec
from services.codec_worker.stage import DecodeStage
from shared.errors import Unavailable
from shared.jobs.store import JobStore
from shared.nats.streams import bootstrap
from shared.schema.job import Job
from shared.schema.request import GenerateRequest
from shared.settings import Settings


class Forgetful(JobStore):
    """Writes, and does not hear of it."""

    async def _put(self, job: Job, revision: int) -> None:
        await super()._put(job, revision)
        raise Unavailable("nats", "the answer got lost")


async def test_a_song_that_was_completed_unheard_keeps_its_audio(nats_settings: Settings) -> None:
    client = await nats.connect(nats_settings.nats_url)
    js = client.jetstream()
    await bootstrap(js, nats_settings)
    jobs = JobStore(js)
    request = GenerateRequest(lyrics="la", seed=1)
    job = Job(job_id="song", tenant="local", request=request, status="decoding", created_at=1.0, fencing_token=7)
    await jobs.create(job)
    stage = DecodeStage(TrivialCodec(0), "trivial", nats_settings)
    delivery: Any = SimpleNamespace(job=job, turn=SimpleNamespace(fencing_token=7))

    async def complete(store: JobStore) -> Job:
        worker: Any = SimpleNamespace(jobs=store)
        return await stage._complete(delivery, worker, "audio/song/7.flac", 100, 8000, 12)

    with pytest.raises(Unavailable):
        await complete(Forgetful(js))
    done = await complete(jobs)  # as `insist` does it
    assert (done.status, done.audio_key) == ("completed", "audio/song/7.flac")
    await client.close()
