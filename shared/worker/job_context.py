"""A claimed job while a worker has it: keeps its message, publishes its events, notices its cancellation."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

from shared.aio import end
from shared.device.offload_phases import Turn
from shared.errors import NewerRecord, Unavailable
from shared.jobs.claims import claim_of
from shared.jobs.events import EventPublisher
from shared.jobs.store import JobStore
from shared.nats.subjects import decode_lane
from shared.schema.event import AnyEvent, Progress
from shared.schema.job import ENDED, DecodeJob, Job, TokenJob
from shared.schema.worker import Role
from shared.worker.message import QueueMessage
from shared.worker.signals import JobStopped, Paused

PROGRESS_INTERVAL = 0.25  # seconds
_CLOSE_SECONDS = 5.0  # for publishing the remaining events


class JobContext:
    """A claimed job: its message, its record, its turn, its events.

    Methods belong to the engine's thread or to the worker's event loop, as marked.
    """

    def __init__(
        self,
        role: Role,
        message: QueueMessage,
        order: TokenJob | DecodeJob,
        job: Job,
        turn: Turn,
        *,
        jobs: JobStore,
        events: EventPublisher,
        keep_every: float,
        count_progress: Callable[[], None],
    ) -> None:
        """`job` is the record as it was claimed. The message is kept every `keep_every` seconds.

        `count_progress` is called for every step, from the engine's thread.
        """
        self.role, self.message, self.order, self.job, self.turn = role, message, order, job, turn
        self.off_device = asyncio.Event()  # nothing of this song is on the device any more
        self._pause = threading.Event()
        self._stop = threading.Event()
        self._jobs, self._events = jobs, events
        self._keep_every, self._count_progress = keep_every, count_progress
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[AnyEvent] = asyncio.Queue()
        self._last_progress = 0.0  # monotonic
        self._tasks = [asyncio.create_task(self._keep_message()), asyncio.create_task(self._publish_events())]

    # --- from the engine's thread

    def check(self) -> None:
        """Raise `LeaseLost`, `PhaseError` or `JobStopped` when the next step must not run. Call before every step."""
        self.turn.check_work()
        if self._stop.is_set():
            raise JobStopped("the song was cancelled")

    def check_pause(self) -> None:
        """Raise `Paused` when the song should leave the device. For stages that can continue a song from there."""
        if self._pause.is_set():
            raise Paused("the device goes to another worker")

    def progress(self, make: Callable[[], Progress], *, final: bool = False) -> None:
        """Report a step; `make` is called only when it is time for another event."""
        self._count_progress()
        now = time.monotonic()
        if final or now - self._last_progress >= PROGRESS_INTERVAL:
            self._last_progress = now
            self.publish_from_engine(make())

    def publish_from_engine(self, event: AnyEvent) -> None:
        """`publish`, from the engine's thread."""
        self._loop.call_soon_threadsafe(self.publish, event)

    # --- from the event loop

    @property
    def stopped(self) -> bool:
        """Whether the song is known to be cancelled, or another worker's."""
        return self._stop.is_set()

    def holds(self, job: Job) -> bool:
        """Whether the song still belongs to this turn by a later record of it."""
        return claim_of(job, self.role).fencing_token == self.turn.fencing_token

    def superseded(self, job: Job) -> bool:
        """Whether a later record shows that the song was claimed by its message in the other lane."""
        lane = job.decode.lane if self.role == "codec" and job.decode is not None else None
        return lane is not None and lane != decode_lane(self.message.subject)

    def stop(self) -> None:
        """Let the next `check` raise `JobStopped`: the song was cancelled."""
        self._stop.set()

    def pause(self) -> None:
        """Let the next `check_pause` raise `Paused`."""
        self._pause.set()

    def publish(self, event: AnyEvent) -> None:
        """Publish an event in the background, after those already reported. Of recordings none is published."""
        if self.job.recording is None:
            self._outbox.put_nowait(event)

    async def close(self) -> None:
        """Publish the remaining events and keep the message no longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._outbox.join()
        await end(*self._tasks)

    async def _publish_events(self) -> None:
        while True:
            event = await self._outbox.get()
            try:
                await self._events.publish(self.job.tenant, event)
            finally:
                self._outbox.task_done()

    async def _keep_message(self) -> None:
        """Keep the message, and check that the song was not cancelled: a cancellation message can get lost."""
        while True:
            await asyncio.sleep(self._keep_every)
            with contextlib.suppress(Unavailable):
                await self.message.keep()
            with contextlib.suppress(Unavailable):
                try:
                    now = await self._jobs.get(self.job.job_id, self.job.tenant)
                except NewerRecord:  # another worker has written it since
                    now = None
                if now is None or now.status in ENDED or not self.holds(now):
                    self.stop()
