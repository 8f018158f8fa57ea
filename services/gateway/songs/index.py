"""Which songs there are, newest first: an index of the job records, kept in memory by following their bucket.

Only ids, times and states are held, about 200 bytes a song. The records themselves are read when they are asked for.
"""

import asyncio
import base64
import binascii
import bisect
import logging

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import APIError

from services.gateway.errors import ApiError
from shared.aio import end
from shared.causes import why
from shared.errors import Unavailable, Unreadable
from shared.nats.ordered_consumer import ordered
from shared.nats.subjects import JOBS
from shared.schema.decoding import read_record
from shared.schema.job import ENDED, Status

log = logging.getLogger(__name__)

_STREAM = f"KV_{JOBS}"
_PREFIX = f"$KV.{JOBS}."
_PATIENCE = 5.0

Place = tuple[float, str]  # when the song was made, its id


class SongIndex:
    """The index of one gateway."""

    def __init__(self, nc: Client, js: JetStreamContext) -> None:
        self._nc, self._js = nc, js
        self._order: dict[str, list[Place]] = {}  # by tenant
        self._songs: dict[str, tuple[str, Place, Status]] = {}  # tenant, place, state
        self._seen = 0  # sequence up to which the bucket was read
        self._moved = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the bucket."""
        self._task = asyncio.create_task(self._run(), name="catalogue")

    async def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            await end(self._task)

    async def page(
        self, tenant: str, limit: int, after: Place | None, status: Status | None
    ) -> tuple[list[str], Place | None]:
        """Up to `limit` ids of a tenant's songs older than `after`, newest first, and the place to go on from, if any.

        Knows every record that was written before the call. Raises `Unavailable`.
        """
        await self._catch_up()
        found: list[Place] = []
        order = self._order.get(tenant, [])
        index = len(order) if after is None else bisect.bisect_left(order, after)
        while index and len(found) <= limit:
            index -= 1
            place = order[index]
            if status is None or self._songs[place[1]][2] == status:
                found.append(place)
        ids = [job_id for _, job_id in found[:limit]]
        return ids, found[limit - 1] if len(found) > limit else None

    async def unended(self, tenant: str) -> int:
        """How many of a tenant's songs wait or run, by every record written before the call. Raises `Unavailable`."""
        await self._catch_up()
        return sum(self._songs[job_id][2] not in ENDED for _, job_id in self._order.get(tenant, []))

    def belongs(self, job_id: str, tenant: str) -> bool:
        """Whether a song is a tenant's. A song that was taken this moment may not be known yet."""
        return (known := self._songs.get(job_id)) is not None and known[0] == tenant

    def forget(self, job_id: str) -> None:
        """The record has expired, which the bucket does not tell."""
        if known := self._songs.pop(job_id, None):
            order = self._order[known[0]]
            del order[bisect.bisect_left(order, known[1])]

    async def _catch_up(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                last = (await self._js.stream_info(_STREAM)).state.last_seq
                async with self._moved:
                    await self._moved.wait_for(lambda: self._seen >= last)
        except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
            raise Unavailable("nats", f"the songs cannot be listed: {why(error)}") from error

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
                log.debug("catalogue: following again after %r", error)
            await asyncio.sleep(0.25)

    async def _follow(self) -> None:
        last = (await self._js.stream_info(_STREAM)).state.last_seq
        if last < self._seen:  # another bucket than before
            self._order, self._songs, self._seen = {}, {}, 0
        async with ordered(self._nc, self._js, _STREAM, self._seen + 1) as messages:
            if not messages.pending:  # the last ones may have expired
                await self._reached(last)
            async for message in messages:
                self._take(message)
                sequence = message.metadata.sequence.stream
                await self._reached(sequence if message.metadata.num_pending else max(sequence, last))

    async def _reached(self, sequence: int) -> None:
        async with self._moved:
            self._seen = max(self._seen, sequence)
            self._moved.notify_all()

    def _take(self, message: Msg) -> None:
        tenant, _, job_id = message.subject.removeprefix(_PREFIX).partition(".")
        try:
            job = read_record(message.subject, message.data) if message.data else None
        except Unreadable:  # of a newer version, or none
            job = None
        if job is None:
            if self.belongs(job_id, tenant):
                self.forget(job_id)
            return
        place = (job.created_at, job_id)
        known = self._songs.get(job_id)
        if known is None or known[1] != place:
            self.forget(job_id)
            bisect.insort(self._order.setdefault(tenant, []), place)
        self._songs[job_id] = (tenant, place, job.status)


def cursor_of(place: Place) -> str:
    """A place as clients are given it."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")


def place_of(cursor: str) -> Place:
    """The other way round. Raises a 422 `ApiError`."""
    try:
        data = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        place: Place = msgspec.json.decode(data, type=Place)
    except (binascii.Error, ValueError):
        raise ApiError(422, "invalid-request", "cursor is not one that was given", field="cursor") from None
    return place
