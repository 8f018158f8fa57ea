"""The parts of a worker that its stage may use."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from nats.aio.client import Client

from shared.jobs.store import JobStore
from shared.storage.objects import ObjectStore
from shared.worker.draining import Draining
from shared.worker.listeners import Listeners
from shared.worker.retry import Retry

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """The collaborators of a stage, alike for every song."""

    nc: Client
    jobs: JobStore
    store: ObjectStore
    engine: Executor  # the engine's thread
    retry: Retry
    draining: Draining
    count_progress: Callable[[], None]  # called when something of a song was stored; from any thread
    memory_used: Callable[[], int]  # bytes in use on the device when last measured
    listeners: Listeners
    models_stay: bool  # no model has to leave its device for the other one
    away: Callable[[], float]  # seconds for which the device was last away from this worker

    async def in_engine(self, call: Callable[[], _T]) -> _T:
        """Run a call in the engine's thread. Raises the errors of the call."""
        return await asyncio.get_running_loop().run_in_executor(self.engine, call)
