"""The end of a song that a user asks for: cancelling one that waits or runs, removing one that has ended."""

import logging

import msgspec
import nats
from nats.js.errors import APIError

from services.gateway.container import Gateway
from services.gateway.errors import ApiError
from services.gateway.songs.status import find_job, last_progress
from shared.causes import why
from shared.errors import HeartMulaError
from shared.jobs.store import change
from shared.nats.streams import purge_job
from shared.nats.subjects import cancel_subject
from shared.schema.event import Cancelled
from shared.schema.job import ENDED, Job, Status

log = logging.getLogger(__name__)


class CancelledBody(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a cancellation or a removal."""

    job_id: str
    status: Status


async def cancel(gateway: Gateway, tenant: str, job_id: str) -> CancelledBody:
    """Cancel a song, queued or running. Raises a 404 or 409 `ApiError`."""
    before = await find_job(gateway, tenant, job_id)

    def decide(job: Job) -> Job:
        nonlocal before
        before = job
        if job.status == "cancelled":
            return job
        if job.status in ("completed", "failed"):
            raise ApiError(409, "conflict", f"the song is {job.status}; only one that has not ended can be cancelled")
        return change(job, status="cancelled")

    job = await gateway.jobs.update(job_id, tenant, decide)
    # From here on it is cancelled, whatever else fails: workers look at the record.
    try:
        await gateway.nc.publish(cancel_subject(job_id))
        await purge_job(gateway.js, job_id)
    except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
        log.warning("%s: cancelled, but its messages were not removed: %s", job_id, why(error))
    if before.status != "cancelled":
        log.info("%s: cancelled", job_id)
        progress = await last_progress(gateway, job)
        await gateway.events.publish(tenant, Cancelled(job_id=job_id, status="cancelled", progress=progress))
    gateway.spawn(_delete_objects(gateway, job_id))
    return CancelledBody(job_id=job_id, status=job.status)


async def forget(gateway: Gateway, tenant: str, job_id: str) -> CancelledBody:
    """Remove a song that has ended, its audio and its record. Raises a 404 or 409 `ApiError`.

    The audio first: where the store does not answer, the song is still there to be removed later.
    """
    job = await find_job(gateway, tenant, job_id)
    if job.status not in ENDED:
        raise ApiError(409, "conflict", f"the song is {job.status}; cancel it before it is removed")
    for prefix in _prefixes(job_id):
        await gateway.store.delete(prefix)
    await gateway.jobs.delete(job)
    log.info("%s: removed", job_id)
    return CancelledBody(job_id=job_id, status=job.status)


async def _delete_objects(gateway: Gateway, job_id: str) -> None:
    for prefix in _prefixes(job_id):
        try:
            await gateway.store.delete(prefix)
        except HeartMulaError as error:
            log.warning("%s: cancelled, but what lies under %s was not deleted: %s", job_id, prefix, error)


def _prefixes(job_id: str) -> tuple[str, str]:
    """Under which all objects of a song lie."""
    return f"tokens/{job_id}/", f"audio/{job_id}/"
