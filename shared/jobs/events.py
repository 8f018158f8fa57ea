"""Publishing the events of songs, and what each event says."""

import itertools
import logging
import os
import time

import msgspec
from nats.js import JetStreamContext

from shared.errors import Unavailable
from shared.frames import samples_of
from shared.nats.errors import nats_errors
from shared.nats.subjects import event_subject
from shared.schema.event import AnyEvent, Audio, Cancelled, Completed, Failed, Progress, cloud_event
from shared.schema.job import ENDED, Job, Status
from shared.write_failures import write_failed

log = logging.getLogger(__name__)

# The two stages' shares of the progress from 0 to 100, by the time that they take on a typical machine.
GENERATING_SHARE = 80.0
DECODING_END = 99.0
_NO_REASON = "the log of the worker says why"


class EventPublisher:
    """Publishes events to the EVENTS stream.

    An event that cannot be published is logged, never raised: the record is the truth, and no song fails for an event.
    """

    def __init__(self, js: JetStreamContext) -> None:
        self._js = js
        self._ids = (f"{os.getpid()}-{time.time_ns():x}-{n}" for n in itertools.count())

    async def publish(self, tenant: str, event: AnyEvent) -> None:
        """Publish one event and wait until the stream has it."""
        kind = str(type(event).__struct_config__.tag)
        payload = msgspec.json.encode(cloud_event(event, next(self._ids)))
        # After a crash the end of a song may be published again; within an hour the stream keeps one of them.
        headers = {"Nats-Msg-Id": f"{event.job_id}:{kind}"} if event.status in ENDED else None
        try:
            with nats_errors(f"event {kind} of {event.job_id} not published"):
                await self._js.publish(event_subject(tenant, event.job_id, kind), payload, timeout=2, headers=headers)
        except Unavailable as error:
            write_failed("nats")
            log.warning("%s", error)


def end_event(job: Job, progress: float = 0.0) -> Completed | Failed | Cancelled:
    """The event that a song has ended, from its record. A song that was not finished keeps its progress."""
    match job.status:
        case "completed":
            return Completed(
                job_id=job.job_id,
                status="completed",
                progress=100,
                result_url=f"/generate/{job.job_id}/result",
                duration_s=job.duration_s or 0.0,
                format=job.request.format,
                seed=job.request.seed or 0,
            )
        case "failed":
            return Failed(job_id=job.job_id, status="failed", progress=progress, error=job.error or _NO_REASON)
        case "cancelled":
            return Cancelled(job_id=job.job_id, status="cancelled", progress=progress)
    raise ValueError(f"the song has not ended, it is {job.status}")


def progress_at_start(status: Status) -> float:
    """Progress, in per cent, when a song enters a state."""
    return {"decoding": GENERATING_SHARE, "completed": 100.0}.get(status, 0.0)


def progress_of(job: Job) -> float:
    """Progress, in per cent, as far as a song's record tells. It does not tell how many tokens are made."""
    if job.status == "decoding" and job.frames and job.decode is not None and job.decode.sample_rate:
        return progress_in_decoding(job.decode.samples / samples_of(job.frames, job.decode.sample_rate))
    return progress_at_start(job.status)


def progress_in_decoding(share: float) -> float:
    """Progress, in per cent, of a song of which so much is decoded, from 0 to 1."""
    return round(GENERATING_SHARE + (DECODING_END - GENERATING_SHARE) * share, 1)


def audible(job: Job) -> Audio:
    """How much of a song can be heard, from its record."""
    return Audio(
        job_id=job.job_id,
        status=job.status,
        progress=progress_of(job),
        playable_seconds=job.playable_seconds,
    )


def generating(job_id: str, done: int, total: int, rate: float | None) -> Progress:
    """Progress of a song whose tokens are being made; `rate` in frames a second."""
    share = GENERATING_SHARE * done / max(total, 1)
    return Progress(
        job_id=job_id,
        status="generating",
        progress=round(share, 1),
        done=done,
        total=total,
        rate=rate and round(rate, 2),
    )


def decoding(job_id: str, done: int, total: int) -> Progress:
    """Progress of a song that is being decoded, in engine steps."""
    progress = progress_in_decoding(done / max(total, 1))
    return Progress(job_id=job_id, status="decoding", progress=progress, done=done, total=total)
