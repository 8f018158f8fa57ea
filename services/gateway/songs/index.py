"""The index of all songs, newest first, kept in memory by following the bucket of job records.

It holds ids, times and states, about 200 bytes a song. The records themselves are read when they are asked for.
"""

import asyncio
import base64
import binascii
import bisect
import logging

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from services.gateway.errors import ApiError
from shared.aio import end
from shared.errors import NotFound, Unavailable, Unreadable
from shared.nats.errors import nats_errors
from shared.nats.ordered_consumer import ordered
from shared.nats.subjects import JOBS
from shared.schema.decoding import read_record
from shared.schema.job import ENDED, Status

log = logging.getLogger(__name__)

_STREAM = f"KV_{JOBS}"
_PREFIX = f"$KV.{JOBS}."
_PATIENCE = 5.0  # seconds until the index must have caught up
_PAUSE_SECONDS = 0.25  # before the bucket is followed again

Place = tuple[float, str]  # of a song in the list: when it was accepted, its id


class SongIndex:
    """The index of one gateway. It is kept up to date in the background; a question waits until it has caught up."""

    def __init__(self, nc: Client, js: JetStreamContext) -> None:
        self._nc, self._js = nc, js
        self._order: dict[str, list[Place]] = {}  # by tenant
        self._songs: dict[str, tuple[str, Place, Status]] = {}  # tenant, place, state
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
        self, tenant: str, limit: int, after: Place | None, status: Status | None
    ) -> tuple[list[str], Place | None]:
        """List up to `limit` ids of a tenant's songs older than `after`, newest first, and the place to go on from.

        The place is None on the last page. Every record written before the call counts. Raises `Unavailable`.
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
        """Count a tenant's songs that wait or run, by every record written before the call. Raises `Unavailable`."""
        await self._catch_up()
        return sum(self._songs[job_id][2] not in ENDED for _, job_id in self._order.get(tenant, []))

    def belongs(self, job_id: str, tenant: str) -> bool:
        """Whether a song is a tenant's. One that was accepted a moment ago may not be known yet."""
        return (known := self._songs.get(job_id)) is not None and known[0] == tenant

    def forget(self, job_id: str) -> None:
        """Remove a song whose record has expired: the bucket does not announce that."""
        if known := self._songs.pop(job_id, None):
            order = self._order[known[0]]
            del order[bisect.bisect_left(order, known[1])]

    async def _catch_up(self) -> None:
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
            self._order, self._songs, self._seen = {}, {}, 0
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
        place = (job.created_at, job_id)
        known = self._songs.get(job_id)
        if known is None or known[1] != place:
            self.forget(job_id)
            bisect.insort(self._order.setdefault(tenant, []), place)
        self._songs[job_id] = (tenant, place, job.status)


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
