"""Where a song stands in the queue for tokens: how many songs come before it that have not got all of theirs.

The stream is not read. A batched direct get of one message also tells how many follow it in its lane, so the songs
before a message are all of the lane less itself and those that follow it: 1.5 ms with 500 songs in the queue.
And because songs only leave a lane or join its end, a place stays as it is until something was taken out.
"""

import asyncio
import json
import time
from collections import OrderedDict
from dataclasses import dataclass

import nats
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import APIError, NotFoundError

from shared.causes import why
from shared.errors import Unavailable
from shared.nats.subjects import TOK, token_subject
from shared.schema.job import Job
from shared.schema.request import Priority

_FRESH_SECONDS = 1.0
_PLACES = 10_000  # songs whose place is remembered
_ASKED_AT_ONCE = 16


@dataclass(frozen=True)
class _Place:
    """A song in its lane."""

    sequence: int  # of its message
    before: int  # songs of the lane that come first
    removed: int  # messages that had been taken out of the queue then


class QueuePositions:
    """The queue for tokens. Methods raise `Unavailable` when NATS does not answer."""

    def __init__(self, nc: Client, js: JetStreamContext) -> None:
        self._nc, self._js = nc, js
        self._looked_at = -_FRESH_SECONDS  # monotonic
        self._looking = asyncio.Lock()
        self._removed = 0  # messages that were ever taken out
        self._high = 0  # songs in the high lane
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._free = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def position(self, job: Job, sequence: int | None = None) -> int | None:
        """Songs before this one; None when it is not in the queue. At most a second old.

        `sequence` is that of its message, where it is known.
        """
        try:
            removed = await self._look()
            place = self._places.get(job.job_id)
            if place is None or place.removed != removed:
                async with self._free:
                    place = await self._find(job, place.sequence if place else sequence, removed)
        except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
            raise Unavailable("nats", f"the queue cannot be read: {why(error)}") from error
        if place is None:
            self._places.pop(job.job_id, None)
            return None
        self._places[job.job_id] = place
        self._places.move_to_end(job.job_id)
        if len(self._places) > _PLACES:
            self._places.popitem(last=False)
        return place.before + (self._high if job.request.priority == "normal" else 0)

    async def _look(self) -> int:
        """How many messages were ever taken out."""
        async with self._looking:
            if time.monotonic() - self._looked_at > _FRESH_SECONDS:
                info, (_, self._high) = await asyncio.gather(self._js.stream_info(TOK), self._from("high", 1))
                # Sequences are given to every message ever stored, so what is not there was taken out.
                self._removed = info.state.last_seq - info.state.messages
                self._looked_at = time.monotonic()
            return self._removed

    async def _find(self, job: Job, known: int | None, removed: int) -> _Place | None:
        lane = job.request.priority
        sequence = known or await self._sequence(job)
        if sequence is None:
            return None
        (_, self._high), (_, all_of_it), (found, behind) = await asyncio.gather(
            self._from("high", 1), self._from(lane, 1), self._from(lane, sequence)
        )
        if found != sequence:  # taken out; were it put in again, the next look finds it by its subject
            return None
        return _Place(sequence=sequence, before=max(0, all_of_it - behind), removed=removed)

    async def _sequence(self, job: Job) -> int | None:
        try:
            return (await self._js.get_msg(TOK, subject=token_subject(job.request.priority, job.job_id))).seq
        except NotFoundError:
            return None

    async def _from(self, lane: Priority, sequence: int) -> tuple[int, int]:
        """The sequence of the first message of a lane at or after `sequence`, and how many there are from it on."""
        wanted = {"seq": sequence, "next_by_subj": f"jobs.tok.{lane}.*", "batch": 1}
        answer = await self._nc.request(f"$JS.API.DIRECT.GET.{TOK}", json.dumps(wanted).encode(), timeout=5)
        headers = answer.headers or {}
        if "Nats-Sequence" in headers:
            return int(headers["Nats-Sequence"]), int(headers["Nats-Num-Pending"]) + 1
        if headers.get("Status") == "404":
            return 0, 0
        raise APIError.from_msg(answer)
