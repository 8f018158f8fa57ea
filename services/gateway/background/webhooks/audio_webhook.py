"""The webhook about a song's first audio: at least once while the song is made, and never after its end.

An attempt is written into the song's record before it begins, and its outcome afterwards. The gateways' consumer
delivers each of these changes, and the one before no more: so there is always one message that leads to the next
attempt, whichever gateway dies. An end that is recorded meanwhile is reported when the attempt must be over.
"""

import time

from services.gateway.background.webhooks.delivery import TIMEOUT
from shared.errors import JobConflict
from shared.jobs.store import JobStore, change
from shared.schema.job import ENDED, AudioWebhook, Job

LONGEST_ATTEMPT = TIMEOUT + 10.0  # seconds; what is added is for the record, and for gateways whose clocks differ


def is_due(job: Job) -> bool:
    """Whether the first audio of a song that has not ended is there, and is still to be reported."""
    delivered = job.audio_webhook is not None and job.audio_webhook.again is None
    return "audio" in job.webhook_events and job.playable_seconds > 0 and not delivered


def seconds_to_wait(job: Job) -> float:
    """Seconds until the next webhook of a song may be sent: while it is made about its audio, later about its end."""
    state = job.audio_webhook
    if state is None or state.again is None or (job.status in ENDED and not state.calling):
        return 0.0
    return max(0.0, state.again - time.time())


async def begin(jobs: JobStore, job: Job) -> Job | None:
    """Record that an attempt begins, which has to end within `TIMEOUT`. Returns the record.

    None if it must not begin: the song has ended, or another gateway reports its audio or has done so.
    Raises `Unavailable`.
    """

    def begun(record: Job) -> Job:
        if not is_due(record) or seconds_to_wait(record):
            raise JobConflict("another gateway reports the song's audio")
        now = time.time()
        since = record.audio_webhook.since if record.audio_webhook else now
        return change(record, audio_webhook=AudioWebhook(since=since, again=now + LONGEST_ATTEMPT, calling=True))

    try:
        return await jobs.update(job.job_id, job.tenant, begun)
    except JobConflict:
        return None


async def settle(jobs: JobStore, job: Job, again: float | None) -> None:
    """Record the outcome of an attempt: when to try again, in seconds since the epoch; None: no more.

    Nothing is recorded of a song that has ended or was removed meanwhile. Raises `Unavailable`.
    """

    def settled(record: Job) -> Job:
        if not is_due(record):
            return record
        since = record.audio_webhook.since if record.audio_webhook else time.time()
        return change(record, audio_webhook=AudioWebhook(since=since, again=again))

    try:
        await jobs.update(job.job_id, job.tenant, settled)
    except JobConflict:
        return
