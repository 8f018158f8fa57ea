"""Every structure that crosses a process boundary, with a schema version.

Requests come from users and are strict; messages, records and events come from ourselves and ignore fields that a
newer version may have added.
"""

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

SCHEMA = 1

Status = Literal["queued", "generating", "decoding", "completed", "failed", "cancelled"]
Priority = Literal["high", "normal"]
AudioFormat = Literal["flac", "wav", "mp3", "ogg"]
Role = Literal["tokenizer", "codec"]

ENDED: frozenset[Status] = frozenset({"completed", "failed", "cancelled"})
DEFAULT_DURATION_MS = 120_000
MAX_SEED = 2**53 - 1  # what JSON carries exactly everywhere
# Both become parts of subjects and keys: nothing in them may be a wildcard, a separator or a path.
JOB_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
TENANT_NAME = re.compile(r"[0-9A-Za-z_-]{1,64}")

Seconds = Annotated[float, Meta(ge=0, lt=253_402_300_000)]  # since the epoch, in years of four digits


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a user asks for. Limits that depend on the model are checked by the gateway at submission."""

    lyrics: Annotated[str, Meta(max_length=60_000, description="the words, with [Verse], [Chorus] … lines")]
    tags: Annotated[str, Meta(max_length=4_000, description="style, divided by commas: pop,piano,english")] = ""
    max_duration_ms: (
        Annotated[int, Meta(ge=80, le=3_600_000, description="longest song wanted; 80 ms make a frame")] | None
    ) = None
    temperature: Annotated[float, Meta(ge=0, le=5, description="0 always takes the likeliest token")] = 1.0
    cfg_scale: Annotated[float, Meta(ge=0, le=20, description="guidance; 1 switches it off and is faster")] = 1.5
    topk: Annotated[int, Meta(ge=1, le=100_000, description="sample among the k likeliest tokens")] = 50
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED, description="same seed, same song; random if absent")] | None = None
    format: AudioFormat = "flac"
    title: Annotated[str, Meta(max_length=300)] | None = None
    priority: Priority = "normal"
    webhook_url: Annotated[str, Meta(max_length=2_000, description="told when the song has ended")] | None = None
    variants: Annotated[int, Meta(ge=1, le=4, description="songs to make of it, with seeds in a row")] = 1


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
    fence: int | None = None  # fencing token of the turn that works on it
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


class SongEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What every event of a song carries."""

    job_id: str
    status: Status
    progress: float  # 0–100; the gateway sees to it that it never goes back


class Queued(SongEvent, frozen=True, kw_only=True, tag="queued"):
    """The song is durably in the queue."""

    queue_position: int | None = None  # songs before it
    eta: str | None = None  # when it is expected to be completed, RFC 3339


class Stage(SongEvent, frozen=True, kw_only=True, tag="stage"):
    """The song entered a stage; `phase` is the offload phase (0–4) that it runs in.

    `paused` means that the device went to somebody else: the song goes on from `frames`.
    """

    stage: Literal["loading", "generating", "paused", "waiting", "decoding", "storing"]
    phase: int | None = None
    frames: int | None = None  # made already, in `generating` and `paused`
    memory_used: int | None = None  # bytes on the device


class Progress(SongEvent, frozen=True, kw_only=True, tag="progress"):
    """Work done within a stage: token frames, or decoding steps."""

    done: int
    total: int
    rate: float | None = None  # per second
    eta: str | None = None  # as in `Queued`


class Completed(SongEvent, frozen=True, kw_only=True, tag="completed"):
    """The audio can be fetched."""

    result_url: str
    duration_s: float
    format: AudioFormat
    seed: int


class Failed(SongEvent, frozen=True, kw_only=True, tag="failed"):
    """The song will not be made."""

    error: str


class Cancelled(SongEvent, frozen=True, kw_only=True, tag="cancelled"):
    """The song was cancelled."""


AnyEvent = Queued | Stage | Progress | Completed | Failed | Cancelled


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True):
    """CloudEvents 1.0, structured mode. On a websocket `id` is the stream sequence, so that a client can resume."""

    specversion: str = "1.0"
    id: str
    source: str = "heartmula"
    type: str
    subject: str
    time: str
    datacontenttype: str = "application/json"
    data: AnyEvent


class GpuFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A device as a worker sees it. Memory in bytes; None where there is nothing to read it from."""

    id: str
    name: str
    kind: Literal["cuda", "cpu"]
    memory_total: int
    memory_used: int
    utilization: int | None = None  # per cent
    temperature: int | None = None  # °C


class PhaseMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory at the two ends of a phase of a worker's latest turn, in bytes."""

    phase: int
    device_before: int
    device_after: int | None = None  # None while it lasts
    host: int  # resident set of the worker's process at its begin


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's heartbeat; gone from the WORKERS bucket when the worker is."""

    schema: int = SCHEMA
    role: Role
    instance: str
    host: str
    pid: int
    engine: str
    model: str
    gpu: GpuFigures
    state: Literal["idle", "waiting", "working"]
    phase: int | None = None
    resident: list[str] = []  # all that lies on the device, of every worker
    jobs: list[str] = []  # songs that it works on
    slots: int = 1  # songs that it can work on at once
    rate: float | None = None  # frames a second of late, of all its songs together; for the codec frames decoded
    song_frames: float | None = None  # mean length of its latest songs
    memory: list[PhaseMemory] = []
    problem: str | None = None  # why it cannot work, for people
    movement: int = 0  # grows with every step, model that loads and song that is handed on
    failed_writes: int = 0  # writes that a server refused or did not confirm, since its start
    since: Seconds  # of the state
    sent: Seconds  # of two workers on a device the later one knows better what lies there


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A contender's key in GPU_LOCK. `ticket` 0 means: the sequence of this very message."""

    schema: int = SCHEMA
    ticket: int
    state: Literal["waiting", "held"]
    role: str
    owner: str  # instance
    phase: int | None = None
    since: Seconds


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def cloud_event(event: AnyEvent, event_id: str) -> CloudEvent:
    """Wrap an event that happens now."""
    kind = type(event).__struct_config__.tag
    return CloudEvent(
        id=event_id, type=f"heartmula.song.{kind}", subject=event.job_id, time=timestamp(time.time()), data=event
    )
