"""The answer to a request for songs that was accepted."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from services.gateway.songs.eta import Expectation
from shared.schema.base import timestamp
from shared.schema.job import Job, Status


class AcceptedBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to a song that was accepted."""

    job_id: str
    status: Status
    status_url: str
    stream_url: str
    result_url: str
    events_url: str
    not_before: Annotated[str, Meta(description="when it is queued, or was")] | None = None
    queue_position: int | None = None  # songs before it
    eta: str | None = None  # when it is expected to be completed, RFC 3339
    variants: Annotated[list["AcceptedBody"], Meta(description="all songs, where several were asked for")] | None = None


@dataclass(frozen=True)
class Accepted:
    """A song that is in the queue, on disk, or that was accepted before under the same key."""

    job: Job
    sequence: int  # of its message in the queue; 0 when it is not, or no longer, there
    expected: Expectation
    duplicate: bool = False  # the same request was accepted before, under the same key
    variants: "tuple[Accepted, ...]" = ()  # all songs, this one first, where several were asked for

    @property
    def body(self) -> AcceptedBody:
        """The answer for a client."""
        base = f"/generate/{self.job.job_id}"
        return AcceptedBody(
            job_id=self.job.job_id,
            status=self.job.status,
            status_url=f"{base}/status",
            stream_url=f"{base}/stream",
            result_url=f"{base}/result",
            events_url=f"{base}/events",
            not_before=None if self.job.not_before is None else timestamp(self.job.not_before),
            queue_position=self.expected.position,
            eta=self.expected.eta,
            variants=[variant.body for variant in self.variants] or None,
        )
