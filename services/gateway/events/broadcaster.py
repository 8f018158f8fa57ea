"""The broadcaster: follows the events of all songs once, and hands them to every subscriber in this process."""

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from prometheus_client import Counter

from services.gateway.events.stored_events import StoredEvent, stored_event
from shared.aio import end
from shared.errors import NotFound, Unavailable
from shared.nats.errors import nats_errors
from shared.nats.ordered_consumer import ordered
from shared.nats.subjects import EVENTS
from shared.schema.event import Audio, Cancelled, Completed, Failed, Progress

log = logging.getLogger(__name__)

SUBSCRIPTION_EVENTS = 64  # that wait for one subscriber
_QUIET_SECONDS = 2.0  # without an event, after which a subscriber learns that there was none
_PAUSE_SECONDS = 0.25  # before the stream is followed again
_REMEMBERED_SONGS = 10_000  # whose progress is remembered


class Subscription:
    """Events for one subscriber. A slow one gets the latest: it loses old progress, never a change of state.

    Of how much can be heard it keeps the latest event: the next one may be a long time in coming.
    """

    def __init__(self) -> None:
        self.lost = False  # events were lost: the subscriber has to begin anew
        self._waiting: deque[StoredEvent] = deque()
        self._came = False  # an event since the latest tick
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        """Number of events that wait."""
        return len(self._waiting)

    def put(self, stored: StoredEvent) -> None:
        """Add an event; never waits."""
        if len(self._waiting) >= SUBSCRIPTION_EVENTS:
            self._waiting = deque(_indispensable(self._waiting, stored))
            if len(self._waiting) >= SUBSCRIPTION_EVENTS:
                self.give_up()
                return
        self._waiting.append(stored)
        self._came = True
        self._filled.set()

    def tick(self) -> None:
        """Handle a tick of the clock that all subscriptions share: a timer each would cost as much as sending."""
        if not self._came and not self._waiting:
            self._filled.set()
        self._came = False

    def give_up(self) -> None:
        """End the subscription as one that has lost events."""
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


def _indispensable(waiting: Sequence[StoredEvent], new: StoredEvent) -> list[StoredEvent]:
    """The events without progress, and of those about how much can be heard only the latest, unless `new` is one."""
    latest = next((item for item in (new, *reversed(waiting)) if isinstance(item.event.data, Audio)), None)
    return [item for item in waiting if item is latest or not isinstance(item.event.data, Progress | Audio)]


class Broadcaster:
    """Follows the EVENTS stream with one consumer and fans out by song."""

    def __init__(self, nc: Client, js: JetStreamContext, ended: Counter) -> None:
        """`ended` counts songs by the ``status`` in which they ended."""
        self._nc, self._js, self._ended = nc, js, ended
        self._last = 0  # sequence of the latest event seen
        self._subscriptions: dict[str, set[Subscription]] = {}  # by song
        self._closing = False
        self._progress: OrderedDict[str, float] = OrderedDict()  # the furthest of recent songs
        self._task: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._clock: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Follow from now on. Raises `Unavailable`."""
        try:
            with nats_errors("events cannot be followed"):
                self._last = (await self._js.stream_info(EVENTS)).state.last_seq
        except NotFound as error:
            raise Unavailable("nats", str(error)) from error
        self._task = asyncio.create_task(self._run(), name="broadcaster")
        self._clock = asyncio.create_task(self._tick(), name="broadcaster-clock")

    async def close(self) -> None:
        """Stop following."""
        for task in (self._task, self._following, self._clock):
            if task is not None:
                await end(task)

    def reconnect(self) -> None:
        """Make a new consumer: the connection was lost and is back, and the server may have forgotten the old one."""
        if self._following is not None:
            self._following.cancel()

    def furthest_progress(self, job_id: str) -> float:
        """Highest progress of a song so far, in per cent. It does not go back when the song begins again."""
        return self._progress.get(job_id, 0.0)

    def end_subscriptions(self) -> None:
        """End every subscription, later ones too: this process ends."""
        self._closing = True
        self._give_up_all()

    @property
    def closing(self) -> bool:
        """Whether this process ends: every new subscription has lost its events already."""
        return self._closing

    @property
    def subscriptions(self) -> int:
        """Number of open subscriptions."""
        return sum(len(found) for found in self._subscriptions.values())

    @contextlib.contextmanager
    def subscribe(self, job_id: str) -> Iterator[Subscription]:
        """Subscribe to a song's events from now on, while the context lasts."""
        subscription = Subscription()
        if self._closing:
            subscription.give_up()
        self._subscriptions.setdefault(job_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions[job_id].discard(subscription)
            if not self._subscriptions[job_id]:
                del self._subscriptions[job_id]

    def _give_up_all(self) -> None:
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.give_up()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_QUIET_SECONDS)
            for subscriptions in self._subscriptions.values():
                for subscription in subscriptions:
                    subscription.tick()

    async def _run(self) -> None:
        while True:
            self._following = asyncio.create_task(self._follow(), name="broadcaster-consumer")
            try:
                await asyncio.wait({self._following})
            finally:
                self._following.cancel()
            if not self._following.cancelled() and (error := self._following.exception()):
                log.debug("events: following again after %r", error)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _follow(self) -> None:
        await self._check_stream()
        async with ordered(self._nc, self._js, EVENTS, self._last + 1) as messages:
            async for message in messages:
                self._dispatch(message)

    async def _check_stream(self) -> None:
        """End all subscriptions where the stream has lost its last events, which need not survive a power cut."""
        last = (await self._js.stream_info(EVENTS)).state.last_seq
        if last < self._last:
            self._last = last
            self._give_up_all()

    def _dispatch(self, message: Msg) -> None:
        self._last = message.metadata.sequence.stream
        stored = stored_event(self._last, message.subject, message.data)
        if stored is None:
            return
        song = stored.event.data
        if isinstance(song, Completed | Failed | Cancelled):
            self._ended.labels(song.status).inc()
        if song.progress > self._progress.get(song.job_id, 0.0):
            self._progress[song.job_id] = song.progress
            self._progress.move_to_end(song.job_id)
            if len(self._progress) > _REMEMBERED_SONGS:
                self._progress.popitem(last=False)
        for subscription in self._subscriptions.get(song.job_id, ()):
            subscription.put(stored)
