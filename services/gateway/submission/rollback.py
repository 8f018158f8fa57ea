"""Rollback: removes what a refused request has stored of a song."""

import logging

import stamina
from nats.js import JetStreamContext

from shared.errors import HeartMulaError, NotFound, Unreadable
from shared.jobs.store import JobStore
from shared.nats.errors import nats_errors
from shared.nats.streams import purge_job
from shared.nats.subjects import JOBS, TOK, job_subject, token_subject
from shared.schema.decoding import read_record
from shared.schema.job import Job
from shared.storage.keys import kept_tokens_key
from shared.storage.objects import ObjectStore

log = logging.getLogger(__name__)

_PATIENCE = 300.0  # seconds


async def roll_back_eventually(js: JetStreamContext, store: ObjectStore, job: Job) -> None:
    """Roll back a song as soon as its servers answer. After five minutes without success it is logged, not raised."""
    try:
        async for attempt in stamina.retry_context(
            on=HeartMulaError, attempts=None, timeout=_PATIENCE, wait_initial=0.5, wait_jitter=0.5, wait_max=5.0
        ):
            with attempt:
                await roll_back(js, store, job)
    except HeartMulaError as error:
        log.warning("%s: may be made although it was refused: %s", job.job_id, error)


async def roll_back(js: JetStreamContext, store: ObjectStore, job: Job) -> None:
    """Remove a song whose id no client has been given. Raises `Unavailable` when a server does not answer."""
    with nats_errors("a refused song could not be removed"):
        if job.digest is None:  # no other request can have found the record
            await purge_job(js, job.job_id)
            await JobStore(js).delete(job)
        else:
            await withdraw(js, job, TOK, token_subject(job.request.priority, job.job_id))
        gone = job.parent is not None and await JobStore(js).get(job.job_id, job.tenant) is None
    if gone:  # else a duplicate of the request has the song, and needs what it takes over
        await store.delete_one(kept_tokens_key(job.job_id))


async def withdraw(js: JetStreamContext, job: Job, queue: str, order: str) -> None:
    """Remove a record that a duplicate of the request may have found, unless the duplicate was accepted.

    `queue` and `order`: the stream and the subject of its message.

    A duplicate is answered only after it has seen the message in the queue and has written the record once more. So
    either the message is there, or a worker had it and changed the record, or the record is newer than the one removed
    here. No delete marker is left: the song may be asked for again.
    """
    subject = job_subject(job.tenant, job.job_id)
    try:
        with nats_errors("the record cannot be read"):
            record = await js.get_msg(f"KV_{JOBS}", subject=subject)
    except NotFound:
        return
    try:
        if record.seq is None or not record.data or read_record(subject, record.data) != job:
            return  # another request's, or a delete marker
    except Unreadable:
        return
    try:
        with nats_errors("the queue cannot be read"):
            await js.get_msg(queue, subject=order)
    except NotFound:
        await js.purge_stream(f"KV_{JOBS}", subject=subject, seq=record.seq + 1)
