"""One message being worked on: kept alive, paused or cancelled between two steps, and settled exactly once."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable

import nats
from nats.aio.msg import Msg
from nats.js.errors import APIError

from shared.aio import end
from shared.device.turn import Turn
from shared.errors import HeartMulaError, NewerRecord, Unavailable
from shared.jobs.events import EventPublisher
from shared.jobs.store import JobStore
from shared.schema.event import AnyEvent, Progress
from shared.schema.job import ENDED, DecodeJob, Job, TokenJob

log = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.25  # seconds
_LAST_EVENTS = 5.0  # seconds for publishing what is left


class JobStopped(HeartMulaError):
    """The song was cancelled, or is no longer ours. Nothing is left to do for it."""


class Paused(HeartMulaError):
    """The song goes back into the queue, through no fault of its own, and goes on from there."""


class JobContext:
    """A claimed job: its message, its record, its events.

    Methods belong to the engine's thread or to the worker's event loop, as marked.
    """

    def __init__(
        self,
        message: Msg,
        order: TokenJob | DecodeJob,
        job: Job,
        turn: Turn,
        *,
        jobs: JobStore,
        events: EventPublisher,
        alive_every: float,  # seconds
        moved: Callable[[], None],  # called for every step, from the engine's thread
    ) -> None:
        self.message, self.order, self.job, self.turn = message, order, job, turn
        self.off_device = asyncio.Event()  # nothing of this song is on the device any more
        self.paused = threading.Event()
        self._stopped = threading.Event()
        self._jobs, self._events = jobs, events
        self._alive_every, self._moved = alive_every, moved
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[AnyEvent] = asyncio.Queue()
        self._last_progress = 0.0
        self._tasks = [asyncio.create_task(self._keep_alive()), asyncio.create_task(self._post())]

    # --- from the engine's thread

    def check(self) -> None:
        """Before every step: raise `LeaseLost` or `JobStopped` when the step must not run."""
        self.turn.check_work()
        if self._stopped.is_set():
            raise JobStopped("the song was cancelled")

    def check_pause(self) -> None:
        """Raise `Paused` when the song should leave the device. A stage that can go on from where it was asks for it
        between two steps, others never do."""
        if self.paused.is_set():
            raise Paused("the device goes to somebody else")

    def progress(self, make: Callable[[], Progress], *, final: bool = False) -> None:
        """Report a step; `make` is called only when it is time for another event."""
        self._moved()
        now = time.monotonic()
        if final or now - self._last_progress >= PROGRESS_INTERVAL:
            self._last_progress = now
            self.tell_from_engine(make())

    def tell_from_engine(self, event: AnyEvent) -> None:
        """`tell`, from the engine's thread."""
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, event)

    # --- from the event loop

    @property
    def stopped(self) -> bool:
        """Whether the song was cancelled, or is no longer ours, as far as is known."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """The song was cancelled: the next `check` raises."""
        self._stopped.set()

    def tell(self, event: AnyEvent) -> None:
        """Publish an event after those already reported, in its own time."""
        self._outbox.put_nowait(event)

    async def close(self) -> None:
        """Publish what is left and stop keeping the message alive."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_EVENTS):
                await self._outbox.join()
        await end(*self._tasks)

    async def _post(self) -> None:
        while True:
            event = await self._outbox.get()
            try:
                await self._events.publish(self.job.tenant, event)
            finally:
                self._outbox.task_done()

    async def _keep_alive(self) -> None:
        """Tell JetStream that the message is being worked on, and look whether the song is still wanted:
        the cancellation message is quick, the record is certain."""
        while True:
            await asyncio.sleep(self._alive_every)
            with contextlib.suppress(nats.errors.Error, APIError, TimeoutError):
                await self.message.in_progress()
            with contextlib.suppress(Unavailable):
                try:
                    now = await self._jobs.get(self.job.job_id, self.job.tenant)
                except NewerRecord:  # not as we wrote it
                    now = None
                if now is None or now.status in ENDED or now.fencing_token != self.job.fencing_token:
                    self._stopped.set()
