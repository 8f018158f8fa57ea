"""Songs that are followed for their listeners: one task a song reads its record when there is news of it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from services.gateway.events.broadcaster import Broadcaster, Subscription
from services.gateway.media.listeners import Listener, ListenerReports
from shared.aio import end
from shared.errors import HeartMulaError
from shared.jobs.store import JobStore
from shared.schema.event import Progress
from shared.schema.job import ENDED, Job

log = logging.getLogger(__name__)

REPORT_SECONDS = 2.0  # from one report of a song's listeners to the next, and from one look at its record to the next
AWAY_SECONDS = 60.0  # for which NATS or the object store may be away while somebody listens


class StreamCut(Exception):
    """A stream cannot go on. Its connection is closed without an end, so that the client notices and comes back."""


class GrowingSong:
    """A song that is being made, or that was when somebody began to listen to it; all its streams share this."""

    def __init__(self, job: Job, read: Callable[[], Awaitable[Job | None]]) -> None:
        self.listeners: set[Listener] = set()
        self.users = 0  # listeners and encoders
        self.first_listener = asyncio.Event()  # a song without a listener got one
        self._job, self._read = job, read
        self._cut: str | None = None
        self._news = asyncio.Event()

    @property
    def job(self) -> Job:
        """The latest record. Raises `StreamCut` where there will be no later one."""
        if self._cut is not None:
            raise StreamCut(self._cut)
        return self._job

    @property
    def is_cut(self) -> bool:
        """Whether it is followed no more, though it had not ended."""
        return self._cut is not None

    async def news(self) -> None:
        """Wait until the record has changed, or the streams are cut."""
        await self._news.wait()

    async def look(self) -> None:
        """Read the record. Raises `Unavailable`."""
        job = await self._read()
        if job is None:
            self.cut("the song was removed")
        elif job != self._job:
            self._job = job
            self._wake()

    def cut(self, reason: str) -> None:
        """Cut all streams."""
        self._cut = self._cut or reason
        self._wake()

    @contextlib.contextmanager
    def listener(self, listener: Listener) -> Iterator[None]:
        """Count a listener while the context lasts."""
        self.listeners.add(listener)
        if len(self.listeners) == 1:
            self.first_listener.set()
        try:
            yield
        finally:
            self.listeners.discard(listener)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class GrowingSongs:
    """Follows the songs that somebody listens to through this gateway."""

    def __init__(self, jobs: JobStore, broadcaster: Broadcaster, reports: ListenerReports) -> None:
        self._jobs, self._broadcaster, self._reports = jobs, broadcaster, reports
        self._songs: dict[str, GrowingSong] = {}
        self._tasks: dict[GrowingSong, asyncio.Task[None]] = {}  # of those too that were cut and have listeners left

    def __len__(self) -> int:
        """Number of songs that are followed, or were for listeners who have not left."""
        return len(self._tasks)

    @contextlib.asynccontextmanager
    async def follow(self, job: Job) -> AsyncIterator[GrowingSong]:
        """Follow a song while the context lasts."""
        song = self._songs.get(job.job_id)
        if song is None or song.is_cut:  # a paused listener may hold one that was cut for minutes
            song = self._songs[job.job_id] = GrowingSong(job, lambda: self._jobs.get(job.job_id, job.tenant))
            self._tasks[song] = asyncio.create_task(self._run(song, job.job_id), name=f"follow-{job.job_id}")
        song.users += 1
        try:
            yield song
        finally:
            song.users -= 1
            if not song.users:
                if self._songs.get(job.job_id) is song:
                    del self._songs[job.job_id]
                await end(self._tasks.pop(song))

    async def _run(self, song: GrowingSong, job_id: str) -> None:
        try:
            await self._follow(song, job_id)
        except StreamCut:
            pass
        except Exception as error:
            song.cut("the song cannot be followed")
            log.error("%s: unexpected %s", job_id, type(error).__name__, exc_info=error)

    async def _follow(self, song: GrowingSong, job_id: str) -> None:
        answered = time.monotonic()
        while song.job.status not in ENDED:
            with self._broadcaster.subscribe(job_id) as subscription:
                while not subscription.lost and song.job.status not in ENDED:
                    try:
                        await song.look()
                        answered = time.monotonic()
                    except HeartMulaError as error:
                        if time.monotonic() > answered + AWAY_SECONDS:
                            song.cut(str(error))
                    await self._reports.report(song.job, song.listeners)
                    await self._until_news(song, subscription)
            if self._broadcaster.closing:
                song.cut("the gateway is shutting down")

    async def _until_news(self, song: GrowingSong, subscription: Subscription) -> None:
        """Wait for an event that may have changed the record, for somebody who begins to listen, or for a while."""
        waiting = [asyncio.create_task(_next_change(subscription)), asyncio.create_task(song.first_listener.wait())]
        try:
            await asyncio.wait(waiting, timeout=REPORT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end(*waiting)
        song.first_listener.clear()


async def _next_change(subscription: Subscription) -> None:
    with contextlib.suppress(TimeoutError):  # quiet for a while
        while (stored := await subscription.get()) is not None and isinstance(stored.event.data, Progress):
            pass
