"""Queue positions: how many songs come before a song in the queue for tokens.

The stream is not read. The answer to a batched direct get of one message also says how many follow it in its lane, so
the songs before a message are all of the lane less itself and those that follow it: 1.5 ms with 500 songs in the queue.
Songs only leave a lane or join its end, so a place holds until a message has been removed.
"""

import asyncio
import json
import time
from collections import OrderedDict
from dataclasses import dataclass

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import APIError

from shared.errors import NotFound, Unavailable
from shared.nats.errors import nats_errors
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
    removed: int  # messages that had been removed from the queue by then


class QueuePositions:
    """Positions in the queue for tokens. Methods raise `Unavailable` when NATS does not answer."""

    def __init__(self, nc: Client, js: JetStreamContext) -> None:
        self._nc, self._js = nc, js
        self._read_at = -_FRESH_SECONDS  # monotonic
        self._reading = asyncio.Lock()
        self._removed = 0  # messages that were ever removed from the queue
        self._high = 0  # songs in the high lane
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._free = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def position(self, job: Job, sequence: int | None = None) -> int | None:
        """The number of songs before this one, at most a second old; None when it is not in the queue.

        `sequence` is that of its message, where it is known.
        """
        try:
            with nats_errors("the queue cannot be read"):
                removed = await self._count_removed()
                place = self._places.get(job.job_id)
                if place is None or place.removed != removed:
                    async with self._free:
                        place = await self._find(job, place.sequence if place else sequence, removed)
        except NotFound as error:
            raise Unavailable("nats", str(error)) from error
        if place is None:
            self._places.pop(job.job_id, None)
            return None
        self._places[job.job_id] = place
        self._places.move_to_end(job.job_id)
        if len(self._places) > _PLACES:
            self._places.popitem(last=False)
        return place.before + (self._high if job.request.priority == "normal" else 0)

    async def _count_removed(self) -> int:
        """How many messages were ever removed from the queue, at most a second old."""
        async with self._reading:
            if time.monotonic() - self._read_at > _FRESH_SECONDS:
                info, (_, self._high) = await asyncio.gather(self._js.stream_info(TOK), self._count_from("high", 1))
                # Every message ever stored has a sequence, so those that are not there were removed.
                self._removed = info.state.last_seq - info.state.messages
                self._read_at = time.monotonic()
            return self._removed

    async def _find(self, job: Job, known: int | None, removed: int) -> _Place | None:
        lane = job.request.priority
        sequence = known or await self._sequence(job)
        if sequence is None:
            return None
        (_, self._high), (_, all_of_it), (found, behind) = await asyncio.gather(
            self._count_from("high", 1), self._count_from(lane, 1), self._count_from(lane, sequence)
        )
        if found != sequence:  # removed; if it is queued again, the next call finds it by its subject
            return None
        return _Place(sequence=sequence, before=max(0, all_of_it - behind), removed=removed)

    async def _sequence(self, job: Job) -> int | None:
        try:
            with nats_errors("the queue cannot be read"):
                return (await self._js.get_msg(TOK, subject=token_subject(job.request.priority, job.job_id))).seq
        except NotFound:
            return None

    async def _count_from(self, lane: Priority, sequence: int) -> tuple[int, int]:
        """The sequence of the first message of a lane from `sequence` on, and how many there are; 0, 0 for none."""
        wanted = {"seq": sequence, "next_by_subj": f"jobs.tok.{lane}.*", "batch": 1}
        answer = await self._nc.request(f"$JS.API.DIRECT.GET.{TOK}", json.dumps(wanted).encode(), timeout=5)
        headers = answer.headers or {}
        if "Nats-Sequence" in headers:
            return int(headers["Nats-Sequence"]), int(headers["Nats-Num-Pending"]) + 1
        if headers.get("Status") == "404":
            return 0, 0
        raise APIError.from_msg(answer)
