"""Two models on one device: they stay where memory allows, and never meet where it does not."""

import asyncio
import sys
from dataclasses import replace

import pytest

from services.gateway.monitoring.worker_registry import WorkerRegistry
from shared.schema.worker import WorkerStatus
from shared.settings import Settings
from tests.integration.flow import PATIENCE, Flow, environment, open_flow, overlaps

# MB: the trivial engines' models take 40 and 30, a decode 1, four songs of two minutes 6.
ROOM_FOR_BOTH, ROOM_FOR_ONE, TOO_SMALL = 80, 76, 30


async def workers(flow: Flow) -> list[WorkerStatus]:
    """The heartbeats of both workers."""
    async with asyncio.timeout(PATIENCE):
        while len(found := await WorkerRegistry(flow.js, 2).live()) < 2:
            await asyncio.sleep(0.1)
    return found


@pytest.mark.parametrize(("mb", "stay"), [(ROOM_FOR_BOTH, True), (ROOM_FOR_ONE, False)])
async def test_both_models_stay_where_memory_allows_and_else_take_turns(
    settings: Settings, mb: int, stay: bool
) -> None:
    async with open_flow(replace(settings, cpu_device_mb=mb), "tokenizer", "codec") as flow:
        plans = [worker.plan for worker in await workers(flow)]
        assert plans[0] is not None
        assert plans[0] == plans[1]
        assert (plans[0].resident, plans[0].capacity) == (stay, mb * 2**20)
        device = (await workers(flow))[0].gpu.id
        for _ in range(2):
            assert (await flow.ended(await flow.submit(1))).status == "completed"
        locks = [path.name for path in (settings.data_dir / "device").glob("*.lock")]
        assert locks == [f"{device}.lock"], "on a CPU the roles compute one after the other, whatever stays"
        journal = flow.journal()
        moves = sorted((move["move"], move["label"]) for move in journal if str(move["label"]).startswith("heart"))
        if stay:
            assert moves == [("place", "heartcodec"), ("place", "heartmula")]
        else:
            assert len(moves) >= 6
            assert overlaps(journal) == 0


async def test_workers_that_disagree_take_no_turn_until_they_are_started_alike(settings: Settings) -> None:
    settings = replace(settings, cpu_device_mb=ROOM_FOR_BOTH, gpu_id="card")
    async with open_flow(settings, "tokenizer") as flow:
        flow.settings = replace(settings, sequential_offload=True)
        other = await flow.worker("codec")
        await workers(flow)
        job_id = await flow.submit(1)
        async with asyncio.timeout(PATIENCE):
            while not any("same settings" in (worker.problem or "") for worker in await workers(flow)):
                await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        assert not (settings.data_dir / "device/card/journal.jsonl").exists(), "a worker used the device"
        assert await flow.stop(other) == 0
        flow.settings = settings
        await flow.worker("codec")
        assert (await flow.ended(job_id)).status == "completed"


async def test_a_song_that_never_fits_beside_the_model_that_stays_fails_at_once(settings: Settings) -> None:
    """10,000 frames take 10 MB; 49 of 80 are the tokenizer's, and the codec has not even come."""
    async with open_flow(replace(settings, cpu_device_mb=ROOM_FOR_BOTH), "tokenizer") as flow:
        huge, small = await flow.submit(800), await flow.submit(1)
        job = await flow.ended(huge)
        assert (job.status, job.failures) == ("failed", 0)
        assert "of the 49 MB of the device" in (job.error or "")
        assert "HEARTMULA_SEQUENTIAL_OFFLOAD=true leaves more" in (job.error or "")
        await flow.until(small, lambda job: job.status == "decoding")


@pytest.mark.parametrize("role", ["tokenizer", "codec"])
async def test_a_device_that_is_too_small_is_refused_at_start(settings: Settings, role: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"services.{role}_worker"),
        env=environment(replace(settings, cpu_device_mb=TOO_SMALL), role),  # type: ignore[arg-type]
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 2
    assert "error: CPU has 30 MiB, too little for the language model (language model 40 MiB" in said.decode()
