"""Responses and events of the service. Fields that a newer service adds are ignored."""

from typing import Any

import msgspec

from heartmula_client.schema import ENDED


class Accepted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A song that the service has accepted."""

    job_id: str
    status: str
    status_url: str
    result_url: str
    events_url: str
    stream_url: str = ""
    not_before: str | None = None  # when it is queued, where that is later
    queue_position: int | None = None  # number of songs before it
    eta: str | None = None  # expected completion, RFC 3339 like all times here
    variants: list["Accepted"] = []  # all accepted songs, where several were requested


class Parent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a song begins with: another song or a recording, up to a moment of it."""

    job_id: str | None = None
    recording_id: str | None = None
    at_ms: int
    exists: bool = True  # false: it was deleted or has expired

    @property
    def id(self) -> str:
        """The id of the song or recording."""
        return self.job_id or self.recording_id or ""


class Song(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of a song."""

    job_id: str
    status: str  # queued, generating, decoding, completed, failed or cancelled
    progress: float = 0.0  # 0–100
    playable_seconds: float = 0.0  # of audio that `Client.stream` yields at once; 0 from a service that has no streams
    created_at: str = ""
    completed_at: str | None = None  # when it reached its final state, whichever that is
    not_before: str | None = None  # when it is queued, or was, where that was to be later than it was accepted
    stage: str | None = None  # current step, while it runs
    queue_position: int | None = None
    eta: str | None = None
    error: str | None = None
    seed: int | None = None
    duration: float | None = None  # seconds of audio
    sample_rate: int | None = None  # Hz
    title: str | None = None
    format: str | None = None
    # Set by `Client.song` and in lists, not by `Client.status`:
    request: dict[str, Any] = {}
    group: str | None = None  # id of the first of its variants, where there are several
    variant: int | None = None  # which of them it is, from 1
    parent: Parent | None = None  # of a song that goes on from another one
    children: list[str] = []  # ids of the songs that go on from it

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.status in ENDED

    @property
    def name(self) -> str:
        """The title, else the first line of lyrics that is not a section, else the tags."""
        lines = (line.strip() for line in str(self.request.get("lyrics", "")).splitlines())
        sung = next((line for line in lines if line and not line.startswith("[")), "")
        return self.title or sung or str(self.request.get("tags", ""))


class Songs(msgspec.Struct, frozen=True, kw_only=True):
    """A page of the list of songs."""

    songs: list[Song]
    next: str | None = None  # cursor of the next page; None on the last one


class Recording(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of a recording."""

    recording_id: str
    status: str  # queued, encoding, ready or failed
    progress: float = 0.0  # 0–100
    created_at: str = ""
    completed_at: str | None = None  # when it became ready, or failed
    title: str | None = None
    duration: float | None = None  # seconds of audio
    sample_rate: int | None = None  # Hz
    channels: int | None = None
    size: int | None = None  # bytes of the upload
    upload_format: str | None = None
    error: str | None = None
    children: list[str] = []  # ids of the songs that go on from it

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.status in ("ready", "failed")


class Recordings(msgspec.Struct, frozen=True, kw_only=True):
    """A page of the list of recordings."""

    recordings: list[Recording]
    next: str | None = None  # cursor of the next page; None on the last one


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A song of a tree."""

    job_id: str
    parent: str | None = None  # id of the song or recording that it goes on from
    at_ms: int | None = None  # the moment of the parent from which it does
    title: str | None = None
    status: str
    created_at: str = ""
    duration: float | None = None  # seconds of audio


class TreeRecording(msgspec.Struct, frozen=True, kw_only=True):
    """The recording that the songs of a tree go back to."""

    recording_id: str
    title: str | None = None
    created_at: str = ""
    duration: float | None = None  # seconds of audio


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """Songs that go on from one another."""

    root: str  # id of the song or recording from which all go on; its record may be gone
    recording: TreeRecording | None = None  # the root, if it is one and is not gone
    songs: list[Version]  # parents before children
    left_out: int = 0  # further songs of a large tree


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A change of a song. Fields that an event does not carry are None."""

    kind: str  # snapshot (the current state), queued, stage, progress, audio, completed, failed or cancelled
    job_id: str
    status: str
    progress: float  # 0–100
    id: str | None = None  # id in the service's event stream; None where the state was polled instead
    time: str | None = None
    stage: str | None = None
    phase: int | None = None  # offload phase, 0–7
    not_before: str | None = None  # of a song that waits: when it is queued
    queue_position: int | None = None
    eta: str | None = None
    done: int | None = None  # completed steps of the stage, out of `total`
    total: int | None = None
    rate: float | None = None  # steps per second
    frames: int | None = None  # tokens made so far, 12.5 a second of music
    memory_used: int | None = None  # bytes on the device
    playable_seconds: float | None = None  # of audio that can be heard
    result_url: str | None = None  # of a completed song, as the next ones
    duration_s: float | None = None
    format: str | None = None
    seed: int | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the song's state is final."""
        return self.status in ENDED


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """The worker that holds a device."""

    role: str
    owner: str
    phase: int | None = None
    since: str = ""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that waits for a device."""

    role: str
    owner: str
    since: str = ""


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker on a device."""

    role: str
    instance: str
    engine: str
    model: str
    state: str
    host: str = ""
    phase: int | None = None
    jobs: list[str] = []
    slots: int = 1
    rate: float | None = None  # frames per second; 12.5 frames are a second of music
    problem: str | None = None
    since: str = ""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU, or the CPU in its place. Memory in bytes, utilisation in per cent, temperature in °C."""

    id: str
    name: str
    kind: str
    memory_total: int
    memory_used: int
    memory_free: int
    utilization: int | None = None
    temperature: int | None = None
    lease: Lease | None = None
    waiting: list[Waiting] = []
    resident: list[str] = []
    workers: list[Worker] = []


class Queues(msgspec.Struct, frozen=True, kw_only=True):
    """Number of songs that wait for a stage or are in it; None where the service does not know."""

    tokens: int | None = None
    decode: int | None = None
    encode: int | None = None  # recordings
    intake: int | None = None  # requests that NATS clients have left, and that are not submitted yet


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """All devices. `available` is false where there is no GPU among them."""

    available: bool
    gpus: list[Device]
    queue: Queues
    problems: list[str] = []


class Server(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """State of a server that the service needs: `ok` is true where it answers."""

    ok: bool
    error: str | None = None


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the service can accept and make songs: `status` is ok, degraded or unavailable."""

    status: str
    nats: Server
    object_store: Server
    workers: dict[str, int]
    queue: Queues
    problems: list[str] = []


def read_frame(frame: str | bytes) -> Event:
    """Decode a websocket frame: the first one is a snapshot, the others are CloudEvents.

    Raises `msgspec.DecodeError` or `msgspec.ValidationError`.
    """
    message = msgspec.json.decode(frame, type=dict[str, Any])
    data = message.get("data")
    if isinstance(data, dict):
        return msgspec.convert(data | {"id": message.get("id"), "time": message.get("time")}, Event)
    return msgspec.convert(message | {"kind": "snapshot"}, Event)


def snapshot_of(song: Song) -> Event:
    """Turn the polled state of a song into an event."""
    return Event(
        kind="snapshot",
        job_id=song.job_id,
        status=song.status,
        progress=song.progress,
        stage=song.stage,
        not_before=song.not_before,
        queue_position=song.queue_position,
        eta=song.eta,
        playable_seconds=song.playable_seconds or None,
        error=song.error,
    )


def same_state(one: Event, other: Event | None) -> bool:
    """Whether two events show the same state."""
    names = ("status", "progress", "stage", "not_before", "queue_position", "eta", "playable_seconds")
    return other is not None and all(getattr(one, name) == getattr(other, name) for name in names)
