"""The body and the signature of a webhook, in the form of Standard Webhooks.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import hashlib
import hmac
from dataclasses import dataclass

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
    """The body of a webhook about an ended song."""

    type: str  # heartmula.song.completed, .failed or .cancelled
    timestamp: str  # when the song ended
    data: Ended


class Audible(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data of a webhook about a song that can be heard while it is made."""

    job_id: str
    status: Status
    created_at: str  # RFC 3339
    playable_seconds: float  # at least, from the song's beginning
    stream_url: str  # below the service's address
    title: str | None = None
    seed: int | None = None
    group: str | None = None


class AudioPayload(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a webhook about a song's first audio."""

    type: str = "heartmula.song.audio"
    timestamp: str  # when it was first tried to be delivered
    data: Audible


@dataclass(frozen=True)
class Call:
    """What is sent to an address: its ``webhook-id``, which is the same when it is sent again, and its body."""

    id: str
    body: bytes


def end_call(job: Job) -> Call:
    """Make the call about a song that has ended."""
    return Call(f"{job.job_id}-{job.status}", msgspec.json.encode(payload_of(job)))


def audio_call(job: Job) -> Call:
    """Make the call about the first audio of a song whose record says that it is being tried."""
    return Call(f"{job.job_id}-audio", msgspec.json.encode(audio_payload_of(job)))


def audio_payload_of(job: Job) -> AudioPayload:
    """Make the body for a song that can be heard, and whose record says since when it is tried to deliver that."""
    assert job.audio_webhook is not None
    return AudioPayload(
        timestamp=timestamp(job.audio_webhook.since),
        data=Audible(
            job_id=job.job_id,
            status=job.status,
            created_at=timestamp(job.created_at),
            playable_seconds=job.playable_seconds,
            stream_url=f"/generate/{job.job_id}/stream",
            title=job.request.title,
            seed=job.request.seed,
            group=job.group,
        ),
    )


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
