"""Taking back a song that was refused after a part of it had been stored."""

import asyncio
import logging
import time

import nats
from nats.js import JetStreamContext
from nats.js.errors import APIError, NotFoundError

from shared.errors import Unavailable, Unreadable
from shared.jobs.store import JobStore
from shared.nats.streams import purge_job
from shared.nats.subjects import JOBS, TOK, job_subject, token_subject
from shared.schema.decoding import read_record
from shared.schema.job import Job

log = logging.getLogger(__name__)

_PATIENCE = 300.0  # seconds


async def retract_in_time(js: JetStreamContext, job: Job) -> None:
    """`retract`, tried again until NATS answers."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            await retract(js, job)
            return
        except (Unavailable, nats.errors.Error, APIError, TimeoutError, OSError):
            await asyncio.sleep(1)
    log.warning("%s: may be made although it was refused; NATS did not answer", job.job_id)


async def retract(js: JetStreamContext, job: Job) -> None:
    """Remove a song that nobody was told of. Raises what the client raises when NATS does not answer."""
    if job.digest is None:  # nobody but who was refused knows its id
        await purge_job(js, job.job_id)
        await JobStore(js).delete(job)
    else:
        await _retract_shared(js, job)


async def _retract_shared(js: JetStreamContext, job: Job) -> None:
    """Remove a record that a duplicate of the request may have found, unless that one was told of the song.

    A duplicate answers only after it saw the message in the queue and wrote the record once more. So either the message
    is there, or a worker had it and changed the record, or the record is newer than the one that is removed here.
    No delete marker is left: the song may be asked for again.
    """
    subject = job_subject(job.tenant, job.job_id)
    try:
        record = await js.get_msg(f"KV_{JOBS}", subject=subject)
    except NotFoundError:
        return
    try:
        if record.seq is None or not record.data or read_record(subject, record.data) != job:
            return  # another request's, or a delete marker
    except Unreadable:
        return
    try:
        await js.get_msg(TOK, subject=token_subject(job.request.priority, job.job_id))
    except NotFoundError:
        await js.purge_stream(f"KV_{JOBS}", subject=subject, seq=record.seq + 1)
