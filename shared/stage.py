"""What differs between the two workers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from shared.delivery import Delivery
from shared.messages import DecodeJob, Job, Role, Status, TokenJob

if TYPE_CHECKING:
    from shared.worker import Worker


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
    def consumers(self) -> Sequence[str]:
        """In the order of their priority."""

    @property
    def wake_subject(self) -> str:
        """A message here means work."""

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
