"""The index of all songs and recordings, newest first, kept in memory by following the bucket of job records.

It holds ids, times, states and what each song goes on from, about 300 bytes each. The records themselves are read
when they are asked for.
"""

import asyncio
import base64
import binascii
import bisect
import logging
import time
from typing import NamedTuple

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from services.gateway.errors import ApiError
from shared.aio import end
from shared.errors import NotFound, Unavailable, Unreadable
from shared.nats.errors import nats_errors
from shared.nats.ordered_consumer import ordered
from shared.nats.streams import JOB_TTL
from shared.nats.subjects import JOBS
from shared.schema.decoding import read_record
from shared.schema.job import ENDED, Status

log = logging.getLogger(__name__)

_STREAM = f"KV_{JOBS}"
_PREFIX = f"$KV.{JOBS}."
_PATIENCE = 5.0  # seconds until the index must have caught up
_PAUSE_SECONDS = 0.25  # before the bucket is followed again

Place = tuple[float, str]  # of a song in the list: when it was accepted, its id


class _Entry(NamedTuple):
    """What is known of a song or recording."""

    tenant: str
    is_recording: bool
    place: Place
    status: Status
    parent: str | None  # id of the song or recording that it goes on from
    written: float  # when its record was written last, seconds since the epoch by the server's clock

    @property
    def expired(self) -> bool:
        """Whether its record must be gone by now: the bucket does not announce that."""
        return time.time() > self.written + JOB_TTL


class SongIndex:
    """The index of one gateway. It is kept up to date in the background; a question waits until it has caught up."""

    def __init__(self, nc: Client, js: JetStreamContext) -> None:
        self._nc, self._js = nc, js
        self._order: dict[tuple[str, bool], list[Place]] = {}  # by tenant, songs and recordings apart
        self._children: dict[tuple[str, str], list[Place]] = {}  # by tenant, and by what they go on from
        self._songs: dict[str, _Entry] = {}
        self._deferred: dict[str, float] = {}  # songs that wait for their time, and that time
        self._seen = 0  # sequence up to which the bucket was read
        self._advanced = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the bucket."""
        self._task = asyncio.create_task(self._run(), name="song-index")

    async def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            await end(self._task)

    async def page(
        self,
        tenant: str,
        limit: int,
        after: Place | None,
        status: Status | None,
        parent: str | None = None,
        *,
        recordings: bool = False,
    ) -> tuple[list[str], Place | None]:
        """List up to `limit` ids of a tenant's songs older than `after`, newest first, and the place to go on from.

        Its `recordings` instead where that is set. Those in a state, or that go on from a `parent`, where that is
        given. The place is None on the last page. Every record written before the call counts. Raises `Unavailable`.
        """
        await self.catch_up()
        found: list[Place] = []
        order = (
            self._order.get((tenant, recordings), []) if parent is None else self._children.get((tenant, parent), [])
        )
        index = len(order) if after is None else bisect.bisect_left(order, after)
        while index and len(found) <= limit:
            index -= 1
            place = order[index]
            if status is None or self._songs[place[1]].status == status:
                found.append(place)
        ids = [job_id for _, job_id in found[:limit]]
        return ids, found[limit - 1] if len(found) > limit else None

    async def unended(self, tenant: str) -> int:
        """Count a tenant's songs and recordings that wait or run, by every record written before the call.

        Raises `Unavailable`.
        """
        await self.catch_up()
        orders = (self._order.get((tenant, recordings), []) for recordings in (False, True))
        return sum(self._songs[job_id].status not in ENDED for order in orders for _, job_id in order)

    async def count_deferred(self) -> int:
        """Count all tenants' songs that wait for their time, by every record written before the call.

        Raises `Unavailable`.
        """
        await self.catch_up()
        return self.deferred_now()

    def deferred_now(self) -> int:
        """Count all tenants' songs that wait for their time, as far as the index has come."""
        return len(self._deferred)

    def due(self, now: float) -> list[tuple[str, str]]:
        """Tenant and id of each song whose time has come, the earliest first."""
        found = sorted((due, self._songs[job_id].place) for job_id, due in self._deferred.items() if due <= now)
        return [(self._songs[job_id].tenant, job_id) for _, (_, job_id) in found]

    def belongs(self, job_id: str, tenant: str) -> bool:
        """Whether a song or recording is a tenant's. One that was accepted a moment ago may not be known yet."""
        return (known := self._songs.get(job_id)) is not None and known.tenant == tenant

    def exists(self, job_id: str, tenant: str) -> bool:
        """Whether a tenant has a song or recording whose record is still there."""
        return self.belongs(job_id, tenant) and not self._songs[job_id].expired

    def is_recording(self, job_id: str, tenant: str) -> bool:
        """Whether a tenant has a recording whose record is still there."""
        return self.exists(job_id, tenant) and self._songs[job_id].is_recording

    def parent_of(self, job_id: str, tenant: str) -> str | None:
        """What a tenant's song goes on from, as far as its record is still there."""
        return self._songs[job_id].parent if self.exists(job_id, tenant) else None

    def children_of(self, job_id: str, tenant: str) -> list[str]:
        """The songs that go on from a tenant's song or recording, which may be gone; the oldest first."""
        found = (child for _, child in self._children.get((tenant, job_id), ()))
        return [child for child in found if not self._songs[child].expired]

    def forget(self, job_id: str) -> None:
        """Remove a song whose record has expired: the bucket does not announce that."""
        self._deferred.pop(job_id, None)
        if known := self._songs.pop(job_id, None):
            _remove(self._order[known.tenant, known.is_recording], known.place)
            if known.parent is not None:
                children = self._children[known.tenant, known.parent]
                _remove(children, known.place)
                if not children:
                    del self._children[known.tenant, known.parent]

    async def catch_up(self) -> None:
        """Return when every record written before the call is known. Raises `Unavailable`."""
        try:
            with nats_errors("the songs cannot be listed"):
                async with asyncio.timeout(_PATIENCE):
                    last = (await self._js.stream_info(_STREAM)).state.last_seq
                    async with self._advanced:
                        await self._advanced.wait_for(lambda: self._seen >= last)
        except NotFound as error:
            raise Unavailable("nats", str(error)) from error

    async def _run(self) -> None:
        while True:
            try:
                with nats_errors("the job records cannot be followed"):
                    await self._follow()
            except (Unavailable, NotFound) as error:
                log.debug("song index: following again after %s", error)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _follow(self) -> None:
        last = (await self._js.stream_info(_STREAM)).state.last_seq
        if last < self._seen:  # the bucket was deleted and made again
            self._order, self._children, self._songs, self._deferred, self._seen = {}, {}, {}, {}, 0
        async with ordered(self._nc, self._js, _STREAM, self._seen + 1) as messages:
            if not messages.pending:  # the last ones may have expired
                await self._reached(last)
            async for message in messages:
                self._take(message)
                sequence = message.metadata.sequence.stream
                await self._reached(sequence if message.metadata.num_pending else max(sequence, last))

    async def _reached(self, sequence: int) -> None:
        async with self._advanced:
            self._seen = max(self._seen, sequence)
            self._advanced.notify_all()

    def _take(self, message: Msg) -> None:
        tenant, _, job_id = message.subject.removeprefix(_PREFIX).partition(".")
        try:
            job = read_record(message.subject, message.data) if message.data else None
        except Unreadable:  # a newer version wrote it, or it is no record
            job = None
        if job is None:
            if self.belongs(job_id, tenant):
                self.forget(job_id)
            return
        parent = job.parent.id if job.parent else None
        written = message.metadata.timestamp.timestamp()
        entry = _Entry(tenant, job.recording is not None, (job.created_at, job_id), job.status, parent, written)
        known = self._songs.get(job_id)
        if known is None or (known.place, known.parent) != (entry.place, entry.parent):
            self.forget(job_id)
            bisect.insort(self._order.setdefault((tenant, entry.is_recording), []), entry.place)
            if parent is not None:
                bisect.insort(self._children.setdefault((tenant, parent), []), entry.place)
        self._songs[job_id] = entry
        if job.deferred and job.not_before is not None:
            self._deferred[job_id] = job.not_before
        else:
            self._deferred.pop(job_id, None)


def _remove(places: list[Place], place: Place) -> None:
    del places[bisect.bisect_left(places, place)]


def cursor_of(place: Place) -> str:
    """Encode a place as the cursor that clients are given."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")


def place_of(cursor: str) -> Place:
    """Decode a cursor. Raises a 422 `ApiError` for one that `cursor_of` never made."""
    try:
        data = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        place: Place = msgspec.json.decode(data, type=Place)
    except (binascii.Error, ValueError):
        raise ApiError(422, "invalid-request", "cursor is not one that was given", field="cursor") from None
    return place
