"""What the service answers, as the client sees it. Fields that a newer service adds are ignored."""

from typing import Any

import msgspec

from shared.schema.job import ENDED


class Accepted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A song that was taken."""

    job_id: str
    status: str
    status_url: str
    result_url: str
    events_url: str
    queue_position: int | None = None  # songs before it
    eta: str | None = None  # when it is expected to be completed, RFC 3339 as all times here
    variants: list["Accepted"] = []  # where several were asked for, all of them


class Song(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of a song."""

    job_id: str
    status: str  # queued, generating, decoding, completed, failed or cancelled
    progress: float = 0.0  # 0–100
    created_at: str = ""
    completed_at: str | None = None  # when it ended, however it ended
    stage: str | None = None  # what is being done, while it runs
    queue_position: int | None = None
    eta: str | None = None
    error: str | None = None
    seed: int | None = None
    duration: float | None = None  # seconds of audio
    sample_rate: int | None = None  # Hz
    title: str | None = None
    format: str | None = None
    group: str | None = None  # id of the first of its variants, where there are several
    request: dict[str, Any] = {}  # what was asked for; told where songs are listed

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ENDED

    @property
    def name(self) -> str:
        """Its title, else the first line that is sung, else its tags."""
        lines = (line.strip() for line in str(self.request.get("lyrics", "")).splitlines())
        sung = next((line for line in lines if line and not line.startswith("[")), "")
        return self.title or sung or str(self.request.get("tags", ""))


class Songs(msgspec.Struct, frozen=True, kw_only=True):
    """A page of the list of songs."""

    songs: list[Song]
    next: str | None = None  # cursor of the next page; None at the end


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that happened to a song. What is not told with an event is None."""

    kind: str  # snapshot (the state as it is), queued, stage, progress, completed, failed or cancelled
    job_id: str
    status: str
    progress: float  # 0–100
    id: str | None = None  # of the event in the service's stream; None where the state was asked for instead
    time: str | None = None
    stage: str | None = None
    phase: int | None = None  # offload phase, 0–4
    queue_position: int | None = None
    eta: str | None = None
    done: int | None = None  # steps of the stage, of `total`
    total: int | None = None
    rate: float | None = None  # steps a second
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the song."""
        return self.status in ENDED


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a device."""

    role: str
    owner: str
    phase: int | None = None
    since: str = ""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """Who waits for a device."""

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
    rate: float | None = None  # frames a second, 12.5 of which are a second of music
    problem: str | None = None


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
    """Songs that wait for a stage or are in it; None when the service does not know."""

    tokens: int | None = None
    decode: int | None = None


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """All devices. `available` is false where there is no GPU among them."""

    available: bool
    gpus: list[Device]
    queue: Queues
    problems: list[str] = []


class Server(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether a server that the service needs answers."""

    ok: bool
    error: str | None = None


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether songs can be taken and made: `status` is ok, degraded or unavailable."""

    status: str
    nats: Server
    object_store: Server
    workers: dict[str, int]
    queue: Queues
    problems: list[str] = []


def read_frame(frame: str | bytes) -> Event:
    """An event as it comes over the websocket: first a snapshot, then CloudEvents.

    Raises `msgspec.DecodeError` or `msgspec.ValidationError`.
    """
    told = msgspec.json.decode(frame, type=dict[str, Any])
    data = told.get("data")
    if isinstance(data, dict):
        return msgspec.convert(data | {"id": told.get("id"), "time": told.get("time")}, Event)
    return msgspec.convert(told | {"kind": "snapshot"}, Event)


def snapshot_of(song: Song) -> Event:
    """The state of a song that was asked for."""
    return Event(
        kind="snapshot",
        job_id=song.job_id,
        status=song.status,
        progress=song.progress,
        stage=song.stage,
        queue_position=song.queue_position,
        eta=song.eta,
        error=song.error,
    )
