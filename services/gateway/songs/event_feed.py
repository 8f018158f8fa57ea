"""The events of a song for one client: a snapshot, the events that it missed, then everything live.

The websocket and the server-sent events both send what this yields.
"""

import time
from collections.abc import Awaitable, Callable

import msgspec
from nats.js import JetStreamContext

from services.gateway.events.broadcaster import Broadcaster, Subscription
from services.gateway.events.stored_events import Frame, StoredEvent, following, last_sequence
from services.gateway.songs.eta import EtaEstimator, Expectation, moved
from services.gateway.songs.status import Songs, StatusBody
from shared.jobs.events import end_event
from shared.nats.subjects import event_subject
from shared.schema.event import AnyEvent, Audio, CloudEvent, Progress, Queued, cloud_event
from shared.schema.job import ENDED, Job

# After so many looks at the place of a waiting song its record is read: an event may be lost, the record is not.
_RECORD_LOOKS = 5


class SnapshotBody(StatusBody, frozen=True, kw_only=True, tag="snapshot", tag_field="type"):
    """The first frame: the state of the song, and the sequence of its latest event."""

    id: str


class EventsLost(Exception):
    """Events of a song were dropped before this client had them; it has to connect again."""


def event_id(text: str) -> int:
    """The id of an event as a client gives it. Raises `ValueError`."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(text)
    return int(text)


class EventFeeds:
    """Follows songs for clients of this gateway."""

    def __init__(self, js: JetStreamContext, songs: Songs, broadcaster: Broadcaster, eta: EtaEstimator) -> None:
        self._js, self._songs, self._broadcaster, self._eta = js, songs, broadcaster, eta

    async def follow(
        self, tenant: str, job_id: str, after: int | None, send: Callable[[Frame], Awaitable[None]]
    ) -> None:
        """Send everything until the song has ended; first the events after `after`, if that is given.

        Raises a 404 `ApiError`, `EventsLost`, `Unavailable`, and whatever `send` raises.
        """
        with self._broadcaster.subscribe(job_id) as subscription:
            await _EventFeed(self._js, self._songs, self._eta, tenant, job_id, send).run(subscription, after)

    async def latest_id(self, job: Job) -> int:
        """The id of a song's latest event; 0 where there is none. Raises `Unavailable`."""
        return await last_sequence(self._js, event_subject(job.tenant, job.job_id, "*"))


class _EventFeed:
    """The events of a song for one client: those that were sent, and those that are still to be sent."""

    def __init__(
        self,
        js: JetStreamContext,
        songs: Songs,
        eta: EtaEstimator,
        tenant: str,
        job_id: str,
        send: Callable[[Frame], Awaitable[None]],
    ) -> None:
        self._js, self._songs, self._eta = js, songs, eta
        self._tenant, self._job_id, self._send = tenant, job_id, send
        self._sent = 0  # sequence of the latest event that the client knows
        self._progress = 0.0
        self._playable = 0.0  # seconds that can be heard, as the client knows
        self._job: Job  # as of the snapshot; its status as of the latest event
        self._expected = Expectation()  # as the client was sent it

    async def run(self, subscription: Subscription, after: int | None) -> None:
        """See `EventFeeds.follow`."""
        # Events before the record: workers write the record first, so the snapshot is never behind its id.
        job = await self._songs.find(self._tenant, self._job_id)
        subject = event_subject(job.tenant, job.job_id, "*")
        last = await last_sequence(self._js, subject)
        await self._snapshot(last)
        self._sent = last
        if after is not None and after < last:
            await self._replay(subject, after, last)
        if self._job.status not in ENDED:
            await self._live(subscription)

    async def _snapshot(self, last: int) -> None:
        await self._read_record()
        body = await self._songs.describe(self._job)
        self._progress, self._expected = body.progress, Expectation.parse(body.queue_position, body.eta)
        snapshot = SnapshotBody(id=str(last), **msgspec.structs.asdict(body))
        await self._send(Frame(snapshot.id, "snapshot", msgspec.json.encode(snapshot).decode()))

    async def _replay(self, subject: str, after: int, last: int) -> None:
        sequence = after + 1
        while sequence <= last:
            stored = await following(self._js, subject, sequence)
            if stored is None or stored.sequence > last:
                return
            await self._event(stored, live=False)
            sequence = stored.sequence + 1

    async def _live(self, subscription: Subscription) -> None:
        quiet = 0  # looks since the latest event
        while True:
            try:
                stored = await subscription.get()
            except TimeoutError:
                quiet += 1
                if await self._look(quiet):
                    return
                continue
            if stored is None:
                raise EventsLost
            quiet = 0
            if stored.sequence > self._sent:
                self._sent = stored.sequence
                await self._event(stored, live=True)
                if stored.event.data.status in ENDED:
                    return

    async def _look(self, quiet: int) -> bool:
        """Send changes without an event: a new queue position, or an end whose event is missing. True after the end."""
        if self._job.status in ENDED:  # for a while, and its event did not come: the process that owed it has died
            await self._send_derived(end_event(self._job, self._progress))
            return True
        if quiet % _RECORD_LOOKS == 0:
            await self._read_record()
        if self._job.status == "queued":
            expected = await self._eta.estimate(self._job)
            sent = self._expected
            if expected.position is not None and (
                expected.position != sent.position or moved(sent.at, expected.at, time.time())
            ):
                self._expected = expected
                await self._send_derived(
                    Queued(
                        job_id=self._job_id,
                        status="queued",
                        progress=self._progress,
                        queue_position=expected.position,
                        eta=expected.eta,
                    )
                )
        return False

    async def _send_derived(self, event: AnyEvent) -> None:
        """Send an event that is in no stream, under the id of the latest that is."""
        await self._send(_frame(cloud_event(event, str(self._sent))))

    async def _event(self, stored: StoredEvent, *, live: bool) -> None:
        data = stored.event.data
        self._progress = max(self._progress, data.progress)
        if isinstance(data, Audio):
            data = self._audio(data, live=live)
        if live and data.status != self._job.status:
            self._job = msgspec.structs.replace(self._job, status=data.status)
        if live and data.status == "decoding" and self._job.frames is None:
            await self._read_record()  # it knows the length by now
            self._job = msgspec.structs.replace(self._job, status=data.status)
        # Most clients of a song see the same frames: what was encoded for one is sent to all.
        place = self._progress, data.status, live
        frame = stored.frames.get(place)
        if frame is None:
            data = msgspec.structs.replace(data, progress=self._progress)
            if live and isinstance(data, Progress):
                data = msgspec.structs.replace(
                    data, eta=(await self._eta.estimate(self._job, data, self._playable)).eta
                )
            frame = _frame(msgspec.structs.replace(stored.event, id=str(stored.sequence), data=data))
            stored.frames[place] = frame
        await self._send(frame)

    def _audio(self, event: Audio, *, live: bool) -> Audio:
        """How much can be heard, in agreement with what the client knows already.

        The codec sends these events beside those of the tokenizer: its word of the state may be older.
        """
        if not live:  # the snapshot said more, or as much
            return msgspec.structs.replace(event, playable_seconds=max(self._playable, event.playable_seconds))
        self._playable = event.playable_seconds
        return msgspec.structs.replace(event, status="decoding") if self._job.status == "decoding" else event

    async def _read_record(self) -> None:
        self._job = await self._songs.find(self._tenant, self._job_id)
        self._playable = self._job.playable_seconds


def _frame(event: CloudEvent) -> Frame:
    return Frame(event.id, event.type, msgspec.json.encode(event).decode())
