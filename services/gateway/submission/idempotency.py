"""Idempotency keys: the id of a song follows from its key, so that sending a request again makes no second song."""

import hashlib
import re
import uuid
from collections.abc import Iterable

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
    """The id of a tenant's song under a key. Raises `InvalidRequest` for a malformed key."""
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            "",
            "a key (the header Idempotency-Key, or Nats-Msg-Id from a NATS client) has 1 to 255 visible ASCII "
            "characters and no space",
        )
    return str(uuid.uuid5(_NAMESPACE, f"{tenant}\n{key}"))


def songs_of(key: str, count: int, tenant: str = TENANT) -> list[str]:
    """The ids of a song and its variants under a key, `count` in all. Raises `InvalidRequest` for a malformed key."""
    first = song_of(key, tenant)
    return [first, *(str(uuid.uuid5(_NAMESPACE, f"{tenant}\n{key}\n{number}")) for number in range(2, count + 1))]


def digest_of(request: GenerateRequest) -> str:
    """A digest of a request as it was sent, before anything was filled in or normalized. Hexadecimal."""
    # Without defaults, so that the digest stays the same when a later version adds a field.
    given = {name: value for name, value in msgspec.structs.asdict(request).items() if value != _DEFAULTS[name]}
    return hashlib.sha256(msgspec.json.encode(given, order="sorted")).hexdigest()


def require_same(jobs: Iterable[Job], digest: str) -> None:
    """Raise a 422 `ApiError` unless all songs were asked for by the same request."""
    if any(job.digest != digest for job in jobs):
        raise ApiError(
            422, "idempotency-mismatch", "another song was asked for under this key; take a new key for a new song"
        )


def removed() -> ApiError:
    """A 409 `ApiError` for a song that its user has removed.

    The song is not made again: the repeated request may only have come late.
    """
    return ApiError(409, "conflict", "the song that was asked for under this key was removed; take a new key")
