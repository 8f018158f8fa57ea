"""A key that makes asking for the same song again harmless: the song's id follows from it."""

import hashlib
import re
import uuid

import msgspec

from services.gateway.errors import ApiError
from shared.errors import InvalidRequest
from shared.nats.subjects import TENANT
from shared.schema.job import Job
from shared.schema.request import GenerateRequest

_NAMESPACE = uuid.UUID("6d2ce1a5-5f0c-4f0a-9a37-2b0f8f6c7d11")
_DEFAULTS = msgspec.structs.asdict(GenerateRequest(lyrics=""))
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def song_of(key: str, tenant: str = TENANT) -> str:
    """The id of a tenant's song under a key. Raises `InvalidRequest` for a key that is none."""
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            "",
            "a key (the header Idempotency-Key, or Nats-Msg-Id from a NATS client) has 1 to 255 visible ASCII "
            "characters and no space",
        )
    return str(uuid.uuid5(_NAMESPACE, f"{tenant}\n{key}"))


def songs_of(key: str, count: int, tenant: str = TENANT) -> list[str]:
    """The ids of the variants of that song, itself the first."""
    first = song_of(key, tenant)
    return [first, *(str(uuid.uuid5(_NAMESPACE, f"{tenant}\n{key}\n{number}")) for number in range(2, count + 1))]


def digest_of(request: GenerateRequest) -> str:
    """Equal for equal requests, as they were sent, before anything was filled in or tidied. Hexadecimal."""
    # Without defaults, so that a field which a later version adds does not make it another request.
    said = {name: value for name, value in msgspec.structs.asdict(request).items() if value != _DEFAULTS[name]}
    return hashlib.sha256(msgspec.json.encode(said, order="sorted")).hexdigest()


def require_same(job: Job, digest: str) -> None:
    """Raise a 422 `ApiError` unless the song was asked for by the same request."""
    if job.digest != digest:
        raise ApiError(
            422, "idempotency-mismatch", "another song was asked for under this key; take a new key for a new song"
        )


def removed() -> ApiError:
    """Its user removed the song: asking again is no reason to make it again, it may be a request that came late."""
    return ApiError(409, "conflict", "the song that was asked for under this key was removed; take a new key")
