"""A song's events for one client: a snapshot, what was missed, then everything live. How they travel is elsewhere."""

import time
from collections.abc import Awaitable, Callable

import msgspec

from services.gateway.container import Gateway
from services.gateway.events.broadcaster import Subscription
from services.gateway.events.store import Frame, StoredEvent, following, last_sequence
from services.gateway.songs.eta import Expectation, moved
from services.gateway.songs.status import StatusBody, describe, find_job
from shared.jobs.events import end_event
from shared.nats.subjects import event_subject
from shared.schema.event import AnyEvent, CloudEvent, Progress, Queued, cloud_event
from shared.schema.job import ENDED, Job

_RECORD_LOOKS = 5  # after so many looks at a waiting song's place, its record: an event may be lost, the record is not


class SnapshotBody(StatusBody, frozen=True, kw_only=True, tag="snapshot", tag_field="type"):
    """The first frame: the state of the song, and the sequence of its latest event."""

    id: str


class Lost(Exception):
    """The client cannot be told everything; it has to come again."""


def event_id(text: str) -> int:
    """The id of an event as a client gives it. Raises `ValueError`."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(text)
    return int(text)


class EventFeed:
    """One client's way through a song's events."""

    def __init__(self, gateway: Gateway, tenant: str, job_id: str, send: Callable[[Frame], Awaitable[None]]) -> None:
        self._gateway, self._tenant, self._job_id, self._send = gateway, tenant, job_id, send
        self._sent = 0  # sequence of the latest event that the client knows
        self._progress = 0.0
        self._job: Job  # as of the snapshot; its status as of the latest event
        self._expected = Expectation()  # as the client was told

    async def run(self, after: int | None) -> None:
        """Send everything until the song has ended, after the event `after` if that is given.

        Raises a 404 `ApiError`, `Lost`, `Unavailable`, and whatever `send` raises.
        """
        with self._gateway.broadcaster.subscribe(self._job_id) as subscription:
            # Events before the record: workers write the record first, so the snapshot is never behind its id.
            job = await find_job(self._gateway, self._tenant, self._job_id)
            subject = event_subject(job.tenant, job.job_id, "*")
            last = await last_sequence(self._gateway.js, subject)
            await self._snapshot(last)
            self._sent = last
            if after is not None and after < last:
                await self._replay(subject, after, last)
            if self._job.status not in ENDED:
                await self._live(subscription)

    async def _snapshot(self, last: int) -> None:
        self._job = await find_job(self._gateway, self._tenant, self._job_id)
        body = await describe(self._gateway, self._job)
        self._progress, self._expected = body.progress, Expectation.parse(body.queue_position, body.eta)
        snapshot = SnapshotBody(id=str(last), **msgspec.structs.asdict(body))
        await self._send(Frame(snapshot.id, "snapshot", msgspec.json.encode(snapshot).decode()))

    async def _replay(self, subject: str, after: int, last: int) -> None:
        sequence = after + 1
        while sequence <= last:
            stored = await following(self._gateway.js, subject, sequence)
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
                raise Lost
            quiet = 0
            if stored.sequence > self._sent:
                self._sent = stored.sequence
                await self._event(stored, live=True)
                if stored.event.data.status in ENDED:
                    return

    async def _look(self, quiet: int) -> bool:
        """Tell what no event tells. Returns whether the song has ended."""
        if self._job.status in ENDED:  # for a while, and its event did not come: whoever was to send it is gone
            await self._tell(end_event(self._job, self._progress))
            return True
        if quiet % _RECORD_LOOKS == 0:
            self._job = await find_job(self._gateway, self._tenant, self._job_id)
        if self._job.status == "queued":
            expected = await self._gateway.eta.estimate(self._job)
            told = self._expected
            if expected.position is not None and (
                expected.position != told.position or moved(told.at, expected.at, time.time())
            ):
                self._expected = expected
                await self._tell(
                    Queued(
                        job_id=self._job_id,
                        status="queued",
                        progress=self._progress,
                        queue_position=expected.position,
                        eta=expected.eta,
                    )
                )
        return False

    async def _tell(self, event: AnyEvent) -> None:
        """Send an event that is in no stream, under the id of the latest that is."""
        await self._send(_frame(cloud_event(event, str(self._sent))))

    async def _event(self, stored: StoredEvent, *, live: bool) -> None:
        data = stored.event.data
        self._progress = max(self._progress, data.progress)
        if live and data.status != self._job.status:
            self._job = msgspec.structs.replace(self._job, status=data.status)
        if live and data.status == "decoding" and self._job.frames is None:
            self._job = await find_job(self._gateway, self._tenant, self._job_id)  # it knows the length by now
            self._job = msgspec.structs.replace(self._job, status=data.status)
        # Listeners of a song mostly see the same: what was made for one is sent to all.
        frame = stored.frames.get((self._progress, live))
        if frame is None:
            data = msgspec.structs.replace(data, progress=self._progress)
            if live and isinstance(data, Progress):
                data = msgspec.structs.replace(data, eta=(await self._gateway.eta.estimate(self._job, data)).eta)
            frame = _frame(msgspec.structs.replace(stored.event, id=str(stored.sequence), data=data))
            stored.frames[self._progress, live] = frame
        await self._send(frame)


def _frame(event: CloudEvent) -> Frame:
    return Frame(event.id, event.type, msgspec.json.encode(event).decode())
