"""Types of requests and responses, as the service defines them. This package needs nothing of the service's code."""

import re
from typing import Literal

import msgspec

Status = Literal["queued", "generating", "decoding", "completed", "failed", "cancelled"]
RecordingStatus = Literal["queued", "encoding", "ready", "failed"]
AudioFormat = Literal["flac", "wav", "mp3", "ogg"]
Priority = Literal["high", "normal"]
WebhookEvent = Literal["ended", "audio"]

ENDED: frozenset[str] = frozenset({"completed", "failed", "cancelled"})  # final states of songs
JOB_ID = re.compile(r"[0-9A-Za-z-]{1,64}")  # ids of songs and recordings


class ContinueFrom(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a song begins with: another song or a recording, one of both."""

    job_id: str | None = None  # a completed song
    recording_id: str | None = None  # a recording that is ready
    at_ms: int | None = None  # how much of it to keep, at least 80 ms; all of it if None
