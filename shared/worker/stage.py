"""What differs between the two workers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from nats.js import JetStreamContext

from shared.schema.job import DecodeJob, Job, Status, TokenJob
from shared.schema.request import Priority
from shared.schema.worker import Role
from shared.worker.job_context import JobContext
from shared.worker.throughput import Throughput

if TYPE_CHECKING:
    from shared.worker.process import Worker


class Stage(Protocol):
    """One worker's part in a song."""

    @property
    def role(self) -> Role: ...

    @property
    def status(self) -> Status:
        """Of a song that is in this stage."""

    @property
    def stream(self) -> str: ...

    @property
    def consumers(self) -> Mapping[Priority, str]:
        """Name of each lane's consumer."""

    @property
    def slots(self) -> int:
        """Songs that it works on at once. Read before each song: less memory may mean fewer."""

    @property
    def rate(self) -> Throughput:
        """Frames that it has done of late."""

    @property
    def order(self) -> type[TokenJob] | type[DecodeJob]:
        """What the messages are."""

    @property
    def model(self) -> str:
        """Its name, for people."""

    @property
    def label(self) -> str:
        """Of the weights on the device."""

    @property
    def weight_bytes(self) -> int:
        """Of the weights on the device."""

    def song_bytes(self, job: Job) -> int:
        """What a song takes on the device beside the weights."""

    def load(self) -> None:
        """Read the weights into host memory."""

    def to_device(self) -> None:
        """Move the weights to the device."""

    def to_host(self) -> None:
        """Move the weights back and free everything else."""

    def accepts(self, job: Job) -> bool:
        """Whether a song in this state still needs this stage."""

    async def obstacle(self, js: JetStreamContext) -> str | None:
        """Why no song can be worked on now, whatever waits; None when nothing is in the way."""

    async def work(self, delivery: JobContext, worker: "Worker") -> None:
        """Do the stage for one song and hand it on: when this returns the message is acknowledged.

        Several run at once. Each sets ``delivery.off_device`` as soon as nothing of its song is on the device.
        Raises `Paused` when the song is to go on from where it was, `TokensLost` when its tokens must be made again.
        """
