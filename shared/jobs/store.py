"""The job record and its state machine, by compare-and-set in the JOBS bucket.

::

    queued ──▶ generating ──▶ decoding ──▶ completed
       └──────────┴──────────────┴──────▶ failed | cancelled

A song that waits for its time is queued, too, and in no queue. A recording, whose audio is there from the beginning, is
completed after generating. Decoding begins before a song is `decoding`: as soon as the tokens of a whole window are
saved. `shared.jobs.claims` has the two stages' claims. A song whose tokens turn out to be damaged or gone goes back
from decoding to queued. A record that has ended never changes again. Message redelivery and deduplication are
conveniences; this is the guard that makes a song end exactly once.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from shared.errors import JobConflict, NewerRecord, NotFound, Unavailable, Unreadable, WrongSequence
from shared.nats.errors import nats_errors
from shared.nats.subjects import JOBS, TENANT, job_subject
from shared.schema.base import CONTINUED_SCHEMA, SCHEMA
from shared.schema.decoding import read_record
from shared.schema.job import ENDED, Job, Status
from shared.write_failures import write_failed

ALLOWED: dict[Status, frozenset[Status]] = {
    "queued": frozenset({"queued", "generating", "failed", "cancelled"}),
    "generating": frozenset({"generating", "decoding", "failed", "cancelled", "queued"}),
    "decoding": frozenset({"decoding", "completed", "failed", "cancelled", "queued"}),
    "completed": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}


def change(job: Job, **changes: Any) -> Job:
    """A copy of the record with changes. Raises `JobConflict` when its state does not allow the new one."""
    new = msgspec.structs.replace(job, **changes)
    if new.deferred and new.status != "queued":  # a worker was quicker than the gateway that queued it, or it has ended
        new = released(new)
    encoded = job.recording is not None and (job.status, new.status) == ("generating", "completed")
    if new.status not in ALLOWED[job.status] and not encoded:
        raise JobConflict(f"the song is {job.status} and cannot become {new.status}")
    if new.status in ENDED:
        new = msgspec.structs.replace(
            new,
            completed_at=time.time(),
            fencing_token=None,
            saved_frames=None,
            decode=None,
            first_part=new.edition,
        )
    return new


def released(job: Job) -> Job:
    """A copy of the record of a song that no longer waits for its time: earlier versions can read it, too."""
    schema = SCHEMA if job.parent is None else CONTINUED_SCHEMA
    return msgspec.structs.replace(job, schema=schema, deferred=False, repeated=False)


def moved_to_decoding(job: Job, tokens_key: str, frames: int) -> Job:
    """A copy of the record of a song whose tokens are all there. Raises `JobConflict` as `change`."""
    return change(
        job,
        status="decoding",
        tokens_key=tokens_key,
        frames=frames,
        fencing_token=None,
        saved_frames=None,
        attempts=0,
        failures=0,
        error=None,
    )


class JobStore:
    """Job records. Every method raises `Unavailable` when NATS does not answer, those that read `NewerRecord` too."""

    def __init__(self, js: JetStreamContext) -> None:
        self._js = js

    async def create(self, job: Job) -> None:
        """Store a new record. Raises `JobConflict` when the id is taken."""
        await self._put(job, 0)

    async def create_over(self, job: Job, is_void: Callable[[Job], Awaitable[bool]]) -> None:
        """Store a new record where there is none, or one that was deleted, or one that is void, by compare-and-set.

        Raises `JobConflict` where there is another one, or another write came in between.
        """
        message = await self._message(job.job_id, job.tenant)
        if message is not None and message.data and not await is_void(_read(message)):
            raise JobConflict("there is a record already")
        await self._put(job, message.seq or 0 if message else 0)

    async def get(self, job_id: str, tenant: str = TENANT) -> Job | None:
        """The record, or None when there is none (never was, or expired)."""
        entry = await self._get(job_id, tenant)
        return entry[0] if entry else None

    async def update(self, job_id: str, tenant: str, decide: Callable[[Job], Job]) -> Job:
        """Change a record by compare-and-set: read, decide, write, and again when another write came in between.

        `decide` returns the new record (`change` helps) or raises; it may be called several times. Returning its
        argument writes nothing. Raises `JobConflict` when there is no record, and whatever `decide` raises.
        """
        while True:
            entry = await self._get(job_id, tenant)
            if entry is None:
                raise JobConflict("there is no record of this song")
            job, revision = entry
            new = decide(job)
            if new is job:
                return job
            try:
                await self._put(new, revision)
            except JobConflict:
                continue
            return new

    async def delete(self, job: Job) -> None:
        """Remove a record. A delete marker stays for as long as a record would, so that the id is not used again."""
        headers = {"KV-Operation": "PURGE", "Nats-Rollup": "sub"}
        await self._publish(job, b"", headers, "the record of a song could not be removed")

    async def was_deleted(self, job_id: str, tenant: str = TENANT) -> bool:
        """Whether there was a record that was deleted; one that expired was not."""
        message = await self._message(job_id, tenant)
        return message is not None and not message.data

    async def _message(self, job_id: str, tenant: str) -> RawStreamMsg | None:
        try:
            with nats_errors("job records cannot be read"):
                # From the leader: a stale read is caught by compare-and-set, but costs a round.
                return await self._js.get_msg(f"KV_{JOBS}", subject=job_subject(tenant, job_id))
        except NotFound:
            return None

    async def _get(self, job_id: str, tenant: str) -> tuple[Job, int] | None:
        message = await self._message(job_id, tenant)
        if message is None or not message.data:  # a delete marker
            return None
        job = _read(message)
        assert message.seq is not None
        return job, message.seq

    async def _put(self, job: Job, revision: int) -> None:
        headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        try:
            await self._publish(job, msgspec.json.encode(job), headers, "job records cannot be written")
        except WrongSequence:
            raise JobConflict("the record changed meanwhile") from None

    async def _publish(self, job: Job, data: bytes, headers: dict[str, str], failure: str) -> None:
        try:
            with nats_errors(failure):
                await self._js.publish(job_subject(job.tenant, job.job_id), data, headers=headers)
        except Unavailable:
            write_failed("nats")
            raise


def _read(message: RawStreamMsg) -> Job:
    try:
        return read_record(message.subject or "", message.data)
    except Unreadable as error:  # a newer version may know states and fields that this one does not
        raise NewerRecord(f"the song's record cannot be read by this version: {error}") from None
