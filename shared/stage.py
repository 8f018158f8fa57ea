"""What differs between the two workers."""

from typing import TYPE_CHECKING, Protocol

from shared.delivery import Delivery
from shared.messages import DecodeJob, Job, Role, Status, TokenJob

if TYPE_CHECKING:
    from shared.worker import Worker


class Stage(Protocol):
    """One worker's part in a song."""

    role: Role
    status: Status  # of a song that is in this stage
    stream: str
    consumers: tuple[str, ...]  # in the order of their priority
    wake_subject: str  # a message here means work
    order: type[TokenJob] | type[DecodeJob]
    model: str  # for people
    label: str  # of the weights on the device

    @property
    def weight_bytes(self) -> int: ...

    def load(self) -> None:
        """Read the weights into host memory."""

    def to_device(self) -> None:
        """Move the weights to the device."""

    def to_host(self) -> None:
        """Move the weights back and free everything else."""

    def accepts(self, job: Job) -> bool:
        """Whether a song in this state still needs this stage."""

    async def work(self, delivery: Delivery, worker: "Worker") -> None:
        """Do the stage for one song and hand it on: when this returns the message is acknowledged."""
