"""The claims of the stages on a song: which turn works on it, and how often that went wrong.

Each stage has its own, because a song may be decoded while its tokens are still being made.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from shared.jobs.store import change
from shared.schema.job import Decode, Job
from shared.schema.worker import Role


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A stage's claim on a song. Its fields are those of `Job` and `Decode`."""

    fencing_token: int | None
    attempts: int
    failures: int


def claim_of(job: Job, role: Role) -> Claim:
    """The claim of a role's stage, as the record says."""
    stage = job.decode or Decode() if role == "codec" else job
    return Claim(fencing_token=stage.fencing_token, attempts=stage.attempts, failures=stage.failures)


def with_claim(job: Job, role: Role, *, claim: dict[str, Any], **changes: Any) -> Job:
    """A copy of the record with fields of a stage's `claim` changed, and others. Raises `JobConflict` as `change`."""
    if role == "codec":
        return change(job, decode=msgspec.structs.replace(job.decode or Decode(), **claim), **changes)
    return change(job, **claim, **changes)
