"""The record of a song, and the messages that queue it. Fields that a newer version may have added are ignored."""

from typing import Literal

import msgspec

from shared.schema.base import SCHEMA, Seconds
from shared.schema.request import GenerateRequest

Status = Literal["queued", "generating", "decoding", "completed", "failed", "cancelled"]
ENDED: frozenset[Status] = frozenset({"completed", "failed", "cancelled"})


class TokenJob(msgspec.Struct, frozen=True, kw_only=True):
    """A song waits for its tokens. Everything else is in the job record."""

    schema: int = SCHEMA
    job_id: str
    tenant: str


class DecodeJob(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of a song's tokens waits for its audio."""

    schema: int = SCHEMA
    job_id: str
    tenant: str
    tokens_key: str  # object key of int16 [8, frames]
    first_frame: int
    frames: int
    last: bool  # no further stretch follows


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a song, the only truth about its state. Changed by compare-and-set alone."""

    schema: int = SCHEMA
    job_id: str
    tenant: str
    request: GenerateRequest  # of this song alone: max_duration_ms and seed filled in, tags tidied, one variant
    tags_sent: str | None = None  # tags as they came, where tidying changed them
    status: Status = "queued"
    created_at: Seconds
    started_at: Seconds | None = None
    completed_at: Seconds | None = None  # when it ended, however it ended
    group: str | None = None  # id of the first of its variants, where several were asked for at once
    variant: int | None = None  # which of them it is, from 1
    digest: str | None = None  # of what was submitted, where a key makes submitting it again harmless
    fencing_token: int | None = msgspec.field(default=None, name="fence")  # of the turn that works on the song
    attempts: int = 0  # turns that began on the current stage and neither saved anything nor gave the song back
    failures: int = 0  # of those, how many raised an error instead of dying with their worker
    tokens_key: str | None = None  # object key of its tokens; while they are made, of the latest checkpoint
    remade: int = 0  # how often its tokens were damaged or gone and had to be made again
    frames: int | None = None  # tokens made, 80 ms each
    audio_key: str | None = None
    audio_bytes: int | None = None
    duration_s: float | None = None
    sample_rate: int | None = None
    error: str | None = None
