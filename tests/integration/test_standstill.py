"""Songs that wait while workers live and make no progress."""

from dataclasses import replace

import httpx
import msgspec
import pytest

from services.gateway.monitoring import health
from shared.nats.subjects import WORKERS
from shared.schema.worker import WorkerStatus
from shared.settings import Settings
from tests.integration.flow import Flow, open_flow
from tests.integration.gateway_fixtures import eventually, in_process


async def movement(flow: Flow, role: str) -> int:
    """Amount of work that the only worker of a role reports."""
    message = await flow.js.get_msg(f"KV_{WORKERS}", subject=f"$KV.{WORKERS}.{role}.*")
    return msgspec.json.decode(message.data or b"", type=WorkerStatus).movement


async def test_an_engine_that_hangs_is_a_problem(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "TTLS", 1)
    monkeypatch.setattr(health, "_PROBE_EVERY", 0.5)
    hung = replace(settings, trivial_step_ms=10_000)
    async with (
        in_process(settings) as (_, _, url),
        open_flow(hung, "tokenizer", "codec") as flow,
        httpx.AsyncClient(base_url=url, trust_env=False) as http,
    ):
        await flow.submit()

        async def seen() -> bool:
            body = (await http.get("/health")).json()
            return body["status"] == "degraded" and any("nothing has moved" in line for line in body["problems"])

        await eventually(seen, "the standstill was not seen")
        assert "heartmula_stalled 1.0" in (await http.get("/metrics")).text


async def test_a_song_that_is_decoded_for_long_moves_though_its_record_does_not(settings: Settings) -> None:
    async with open_flow(settings, "tokenizer") as flow:
        flow.settings = replace(settings, trivial_step_ms=1000)
        await flow.worker("codec")
        job_id = await flow.submit(40)  # 20 steps
        record = await flow.until(job_id, lambda job: job.status == "decoding" and job.decode is not None)
        before = await movement(flow, "codec")

        async def further() -> bool:
            return await movement(flow, "codec") > before

        await eventually(further, "no step was seen")
        assert await flow.jobs.get(job_id) == record
