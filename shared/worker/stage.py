"""A stage: the part of the work on a song that one kind of worker does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nats.js import JetStreamContext

from shared.schema.job import DecodeJob, Job, Status, TokenJob
from shared.schema.request import Priority
from shared.schema.worker import Role
from shared.worker.job_context import JobContext
from shared.worker.throughput import Throughput
from shared.worker.worker_context import WorkerContext


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """The constants of a stage."""

    role: Role
    status: Status  # of a song while it is in this stage
    stream: str  # name of its queue
    consumers: Mapping[Priority, str]  # names of the queue's consumers, one a lane
    order: type[TokenJob] | type[DecodeJob]  # type of the queue's messages
    accepts: frozenset[Status]  # states in which a song still needs this stage
    weights_label: str  # of the model's weights in the device's ledger
    may_stay: bool = True  # whether the weights stay on the device between turns, where models stay
    refusal: str | None = None  # why no song can ever be worked on: each one fails with these words


class JobStage(Protocol):
    """One stage: its model, and what it does with a song."""

    @property
    def spec(self) -> StageSpec:
        """The constants of the stage."""

    @property
    def model(self) -> str:
        """Name of the model, for users."""

    @property
    def slots(self) -> int:
        """Number of songs that the stage works on at once. Read before each song: less memory may mean fewer."""

    @property
    def rate(self) -> Throughput:
        """Speed of the latest work."""

    @property
    def notes(self) -> Sequence[str]:
        """What the engine does without on this machine, for people: a line for each, mostly none."""

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take on the device."""

    def song_bytes(self, job: Job) -> int:
        """Bytes that a song takes on the device beside the weights."""

    def load(self) -> None:
        """Read the weights into host memory. Raises `ConfigError`."""

    def to_device(self) -> None:
        """Move the weights to the device. Raises `DeviceFull` or `DeviceBroken`."""

    def to_host(self) -> None:
        """Move the weights back to host memory and free everything else on the device."""

    async def obstacle(self, js: JetStreamContext) -> str | None:
        """Why no song can be worked on now, for users; None when nothing is in the way.

        Raises `Unavailable` or `NotFound`.
        """

    async def dry_in(self, worker: WorkerContext) -> float | None:
        """Seconds until a listener runs dry whom the other role can help with what this stage left to it.

        None where there is none, or none who would run dry soon. Raises nothing.
        """

    async def run(self, context: JobContext, worker: WorkerContext) -> None:
        """Do the stage for one song and hand it on: when this returns, the message may be acknowledged.

        Several run at once. Each sets ``context.off_device`` as soon as nothing of its song is on the device.
        Raises `Paused` when the song is to continue from where it was, `TokensLost` when its tokens must be made again.
        """

    async def settled(self, context: JobContext, worker: WorkerContext) -> None:
        """Look after a song whose message was acknowledged: what came up meanwhile found a message in the queue."""
