"""The body and the signature of a webhook, in the form of Standard Webhooks.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import hashlib
import hmac

import msgspec

from shared.schema.base import timestamp
from shared.schema.job import Job, Status
from shared.schema.request import AudioFormat


class Ended(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data of a webhook about an ended song."""

    job_id: str
    status: Status
    created_at: str  # RFC 3339
    completed_at: str
    result_url: str | None = None  # below the service's address
    title: str | None = None
    format: AudioFormat | None = None
    duration: float | None = None  # seconds
    seed: int | None = None
    group: str | None = None
    error: str | None = None


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a webhook."""

    type: str  # heartmula.song.completed, .failed or .cancelled
    timestamp: str  # when the song ended
    data: Ended


def payload_of(job: Job) -> Payload:
    """Make the body for a song that has ended."""
    done = job.status == "completed"
    ended = timestamp(job.completed_at or job.created_at)
    return Payload(
        type=f"heartmula.song.{job.status}",
        timestamp=ended,
        data=Ended(
            job_id=job.job_id,
            status=job.status,
            created_at=timestamp(job.created_at),
            completed_at=ended,
            result_url=f"/generate/{job.job_id}/result" if done else None,
            title=job.request.title,
            format=job.request.format if done else None,
            duration=job.duration_s,
            seed=job.request.seed,
            group=job.group,
            error=job.error if job.status == "failed" else None,
        ),
    )


def sign(secret: bytes, message_id: str, seconds: int, body: bytes) -> str:
    """Make the ``webhook-signature`` header, version 1. `seconds` since the epoch, as in ``webhook-timestamp``."""
    signed = f"{message_id}.{seconds}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
