"""Bodies of the answers to NATS clients, and the numbers of their errors."""

import msgspec

from services.gateway.errors import ApiError
from services.gateway.submission.accepted import AcceptedBody

_QUEUE_FULL = 10077  # the code of JetStream for a full stream: clients know it
ERROR_CODES = {  # `err_code`; stable, in a range that the server does not use
    "invalid-request": 20001,
    "malformed-json": 20002,
    "too-large": 20003,
    "unavailable": 20004,
    "internal": 20005,
    "idempotency-mismatch": 20006,
    "conflict": 20007,
    "unauthorized": 20008,
    "too-many-requests": 20009,
    "unknown-job": 20010,
    "no-tokens": 20011,
    "unknown-recording": 20012,
    "not-ready": 20013,
    "queue-full": _QUEUE_FULL,
}


class TakenBody(AcceptedBody, frozen=True, kw_only=True):
    """The answer to a NATS client whose song was accepted: a PubAck and more."""

    stream: str
    seq: int
    duplicate: bool


class StoredBody(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a NATS client whose request is in the intake: a PubAck, and the id that the song will have."""

    stream: str
    seq: int
    duplicate: bool
    job_id: str


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """An error in JetStream's form: these members and no more, since client libraries know no others."""

    code: int
    err_code: int
    description: str

    @classmethod
    def of(cls, error: ApiError) -> "ErrorBody":
        """The error in this form."""
        code = ERROR_CODES.get(error.kind, ERROR_CODES["internal"])
        return cls(code=error.status, err_code=code, description=error.detail)


class RefusedBody(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a NATS client whose request failed."""

    error: ErrorBody
