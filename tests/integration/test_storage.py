"""Limits on the storage of streams, and what happens before it is used up."""

from dataclasses import replace

import httpx
import msgspec
import nats
from nats.js.api import StreamConfig

from deploy.setup import set_up
from shared.jobs.store import change
from shared.nats.subjects import EVENTS, GPU_LOCK, JOBS, TENANT
from shared.settings import Settings
from tests.integration.flow import as_role
from tests.integration.gateway_fixtures import SONG, eventually, running_gateway


async def test_streams_reserve_less_where_there_is_less(nats_settings: Settings) -> None:
    client = await nats.connect(nats_settings.nats_url)
    js = client.jetstream()
    await js.add_stream(StreamConfig(name="OTHERS", subjects=["others"], max_bytes=5 << 29))
    for _ in range(2):  # and again
        await set_up(as_role(nats_settings, "bootstrap"))
        sizes = {name: (await js.stream_info(name)).config.max_bytes or -1 for name in (f"KV_{JOBS}", EVENTS)}
        assert sizes == {f"KV_{JOBS}": 512 << 20, EVENTS: 256 << 20}
    assert (await js.stream_info(f"KV_{GPU_LOCK}")).config.max_bytes in (None, -1)
    await js.delete_stream("OTHERS")
    await set_up(as_role(nats_settings, "bootstrap"))
    assert (await js.stream_info(f"KV_{JOBS}")).config.max_bytes == 1 << 30
    await client.close()


async def test_songs_are_refused_before_a_record_cannot_grow(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        job_id = await gateway.submit()
        config = (await gateway.js.stream_info(f"KV_{JOBS}")).config
        await gateway.js.update_stream(replace(config, max_bytes=400_000))
        for number in range(32):
            long = msgspec.structs.replace(await gateway.job(job_id), job_id=str(number), error="x" * 10_000)
            await gateway.jobs.create(long)

        async def refused() -> httpx.Response | None:
            answer = await gateway.http.post("/generate", json=SONG)
            return answer if answer.status_code == 503 else None

        answer = await eventually(refused, "songs are taken until nothing fits")
        assert answer.json()["service"] == "nats"
        assert "the records of songs take" in answer.json()["detail"]
        body = (await gateway.http.get("/health")).json()
        assert body["status"] == "degraded"
        assert answer.json()["detail"] in body["problems"]
        await gateway.jobs.update(job_id, TENANT, lambda job: change(job, status="generating", error="x" * 10_000))
