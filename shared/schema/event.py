"""The events of a song, as CloudEvents."""

import time
from typing import Literal

import msgspec

from shared.schema.base import timestamp
from shared.schema.job import Status
from shared.schema.request import AudioFormat


class SongEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Fields that every event of a song has."""

    job_id: str
    status: Status
    progress: float  # 0–100; the gateway ensures that it never goes back


class Queued(SongEvent, frozen=True, kw_only=True, tag="queued"):
    """The song is durably in the queue, or waits for its time."""

    not_before: str | None = None  # while it waits for its time: when it will be queued, RFC 3339
    queue_position: int | None = None  # songs before it
    eta: str | None = None  # when it is expected to be completed, RFC 3339


class Stage(SongEvent, frozen=True, kw_only=True, tag="stage"):
    """The song entered a stage; `phase` is the offload phase (0–4) that it runs in.

    `paused` means that the device went to another worker: the song goes on from `frames`.
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


class Audio(SongEvent, frozen=True, kw_only=True, tag="audio"):
    """More of the song can be heard, while the rest is being made."""

    playable_seconds: float  # from the song's beginning


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


AnyEvent = Queued | Stage | Progress | Audio | Completed | Failed | Cancelled


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes of every event: CloudEvents 1.0, structured mode."""

    specversion: str = "1.0"
    id: str
    source: str = "heartmula"
    type: str
    subject: str
    time: str
    datacontenttype: str = "application/json"


class CloudEvent(Envelope, frozen=True, kw_only=True):
    """CloudEvents 1.0, structured mode. On a websocket `id` is the stream sequence, so that a client can resume."""

    data: AnyEvent


def cloud_event(event: AnyEvent, event_id: str) -> CloudEvent:
    """Wrap an event that happens now."""
    kind = type(event).__struct_config__.tag
    return CloudEvent(
        id=event_id, type=f"heartmula.song.{kind}", subject=event.job_id, time=timestamp(time.time()), data=event
    )
