"""All events of all songs, followed once, and handed to whoever listens in this process."""

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Iterator

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from prometheus_client import Counter

from services.gateway.events.store import StoredEvent, stored_event
from shared.aio import end
from shared.causes import why
from shared.errors import Unavailable
from shared.nats.ordered_consumer import ordered
from shared.nats.subjects import EVENTS
from shared.schema.event import Cancelled, Completed, Failed, Progress

log = logging.getLogger(__name__)

MAILBOX_EVENTS = 64
_QUIET_SECONDS = 2.0  # without an event, after which a listener is told that there was none
_PEAKS = 10_000  # songs whose progress is remembered


class Subscription:
    """Events for one listener. A slow one gets the latest: it loses old progress, never a change of state."""

    def __init__(self) -> None:
        self.lost = False  # the listener has to begin anew
        self._waiting: deque[StoredEvent] = deque()
        self._came = False  # something since the latest tick
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        """How many events wait."""
        return len(self._waiting)

    def put(self, stored: StoredEvent) -> None:
        """Add an event; never waits."""
        if len(self._waiting) >= MAILBOX_EVENTS:
            changes = [item for item in self._waiting if not isinstance(item.event.data, Progress)]
            if len(changes) >= MAILBOX_EVENTS:
                self.give_up()
                return
            self._waiting = deque(changes)
        self._waiting.append(stored)
        self._came = True
        self._filled.set()

    def tick(self) -> None:
        """Some time has passed; one clock for all, for a timer each would cost as much as sending."""
        if not self._came and not self._waiting:
            self._filled.set()
        self._came = False

    def give_up(self) -> None:
        """Tell the listener that it cannot be told everything."""
        self.lost = True
        self._filled.set()

    async def get(self) -> StoredEvent | None:
        """The next event; None when there will be none because events were lost.

        Raises `TimeoutError` when nothing came from one tick to the next.
        """
        await self._filled.wait()
        if self.lost:
            return None
        if not self._waiting:
            self._filled.clear()
            raise TimeoutError
        stored = self._waiting.popleft()
        if not self._waiting:
            self._filled.clear()
        return stored


class Broadcaster:
    """Follows the EVENTS stream with one consumer and fans out by song."""

    def __init__(self, nc: Client, js: JetStreamContext, ended: Counter) -> None:
        """`ended` counts songs by the ``status`` in which they ended."""
        self._nc, self._js, self._ended = nc, js, ended
        self._last = 0  # sequence of the latest event seen
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._dismissed = False
        self._peaks: OrderedDict[str, float] = OrderedDict()  # the furthest progress of recent songs
        self._task: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._clock: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Follow from now on. Raises `Unavailable`."""
        try:
            self._last = (await self._js.stream_info(EVENTS)).state.last_seq
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise Unavailable("nats", f"events cannot be followed: {why(error)}") from error
        self._task = asyncio.create_task(self._run(), name="hub")
        self._clock = asyncio.create_task(self._tick(), name="hub-clock")

    async def close(self) -> None:
        """Stop following."""
        for task in (self._task, self._following, self._clock):
            if task is not None:
                await end(task)

    def renew(self) -> None:
        """The connection was lost and is back: what the server knew of us may be gone."""
        if self._following is not None:
            self._following.cancel()

    def peak(self, job_id: str) -> float:
        """The furthest progress that was seen of a song: one that is begun again does not go back."""
        return self._peaks.get(job_id, 0.0)

    def dismiss(self) -> None:
        """Send every listener away, those that are still to come too: this process ends."""
        self._dismissed = True
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.give_up()

    @property
    def listeners(self) -> int:
        """How many mailboxes are open."""
        return sum(len(found) for found in self._subscriptions.values())

    @contextlib.contextmanager
    def listen(self, job_id: str) -> Iterator[Subscription]:
        """A mailbox for a song's events from now on."""
        subscription = Subscription()
        if self._dismissed:
            subscription.give_up()
        self._subscriptions.setdefault(job_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions[job_id].discard(subscription)
            if not self._subscriptions[job_id]:
                del self._subscriptions[job_id]

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_QUIET_SECONDS)
            for subscriptions in self._subscriptions.values():
                for subscription in subscriptions:
                    subscription.tick()

    async def _run(self) -> None:
        while True:
            self._following = asyncio.create_task(self._follow(), name="hub-consumer")
            try:
                await asyncio.wait({self._following})
            finally:
                self._following.cancel()
            if not self._following.cancelled() and (error := self._following.exception()):
                log.debug("events: following again after %r", error)
                await asyncio.sleep(0.25)

    async def _follow(self) -> None:
        await self._check_stream()
        async with ordered(self._nc, self._js, EVENTS, self._last + 1) as messages:
            async for message in messages:
                self._dispatch(message)

    async def _check_stream(self) -> None:
        """The stream may be shorter than we saw it: its last events need not survive a power cut."""
        last = (await self._js.stream_info(EVENTS)).state.last_seq
        if last < self._last:
            self._last = last
            for subscriptions in self._subscriptions.values():
                for subscription in subscriptions:
                    subscription.give_up()

    def _dispatch(self, message: Msg) -> None:
        self._last = message.metadata.sequence.stream
        stored = stored_event(self._last, message.subject, message.data)
        if stored is None:
            return
        song = stored.event.data
        if isinstance(song, Completed | Failed | Cancelled):
            self._ended.labels(song.status).inc()
        if song.progress > self._peaks.get(song.job_id, 0.0):
            self._peaks[song.job_id] = song.progress
            self._peaks.move_to_end(song.job_id)
            if len(self._peaks) > _PEAKS:
                self._peaks.popitem(last=False)
        for subscription in self._subscriptions.get(song.job_id, ()):
            subscription.put(stored)
