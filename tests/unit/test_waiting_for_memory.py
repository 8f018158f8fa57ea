"""A song that waits for memory of the device: its problem is published from one attempt to the next."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock, call

import pytest

from services.tokenizer_worker.stage import SPEC
from shared.errors import DeviceFull
from shared.worker.job_runner import JobRunner
from shared.worker.outcome import DeviceMemory
from shared.worker.state import WorkerState
from shared.worker.turn_loop import TurnLoop

PROBLEM = "waiting for memory on the device: too little"


async def test_a_song_that_waits_a_minute_for_memory_is_reported_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sixth attempt, in a turn that is taken for it."""
    now = 1000.0
    monkeypatch.setattr("shared.worker.state.time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    state = WorkerState()
    state.report(PROBLEM, 32)
    during = []

    async def attempt(*_: object) -> None:
        during.append(state.problem)
        raise DeviceFull("too little")

    song = SimpleNamespace(job_id="a", attempts=1, failures=0, fencing_token=1, decode=None, status="generating")
    message = MagicMock(redelivered=True, headers=None, queued_at=0.0)
    context: Any = MagicMock(job=song, message=message, off_device=asyncio.Event(), close=AsyncMock())
    stage: Any = SimpleNamespace(spec=SPEC, slots=1, obstacle=AsyncMock(return_value=None), run=attempt)
    memory = DeviceMemory(needed=50, share=60, taken=30, miscount=6, waits=5, stays=False)
    residency: Any = MagicMock(memory_used=0, enter=AsyncMock(), load=AsyncMock(), unload=AsyncMock())
    residency.obstacle.return_value, residency.memory_for.return_value = None, memory
    draining: Any = SimpleNamespace(active=False, device_broken=None, sleep=AsyncMock())
    held = MagicMock(alive=True, release=AsyncMock(side_effect=lambda: setattr(draining, "active", True)))
    parts: Any = {
        "residency": residency,
        "gate": MagicMock(obstacle=AsyncMock(return_value=None)),
        "state": state,
        "metrics": MagicMock(),
        "wake": asyncio.Event(),
    }
    settlement: Any = AsyncMock()
    worker: Any = MagicMock(draining=draining)
    await TurnLoop(
        stage,
        MagicMock(),
        MagicMock(acquire=AsyncMock(return_value=held)),
        consumer=AsyncMock(next=AsyncMock(return_value=context)),
        worker=worker,
        runner=JobRunner(stage, worker, settlement, **parts),
        settlement=settlement,
        store=MagicMock(),
        policy=MagicMock(),
        draining=draining,
        **parts,
    ).run()
    assert settlement.give_back.await_args_list == [call(context, 60, False)]
    assert during == [PROBLEM], "the attempt may fail again"
    now += 74
    assert state.problem == PROBLEM, "it is tried again a minute later"
