"""API keys: the file that lists them, the tenant that each belongs to, and the limits of that tenant.

The file holds no key, only their SHA-256: keys are random and long, so a slower hash would add nothing, and the time
that a comparison takes says nothing about a key.
"""

import hashlib
import logging
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from shared.errors import ConfigError
from shared.frames import FRAME_MS
from shared.schema.base import TENANT_NAME

log = logging.getLogger(__name__)

CHECK_SECONDS = 2.0  # between two checks whether the file has changed
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of a tenant. None: no limit of its own."""

    songs_per_minute: Annotated[float, msgspec.Meta(gt=0, le=100_000)] | None = None
    burst: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None  # songs at once; None: those of a minute
    songs_at_once: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None  # waiting or running
    max_duration_ms: Annotated[int, msgspec.Meta(ge=FRAME_MS)] | None = None
    priority: bool = True  # whether a song may have priority high

    @property
    def room(self) -> int:
        """Number of songs that the token bucket of `songs_per_minute` holds."""
        return self.burst or max(1, math.ceil(self.songs_per_minute or 1))


@dataclass(frozen=True)
class Caller:
    """The tenant that a request comes from."""

    tenant: str
    limits: Limits = field(default_factory=Limits)


class _Entry(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tenant in the file."""

    name: str
    keys: list[str]
    priority: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: list[_Entry] = []


def read_keys(path: Path) -> dict[str, Caller]:
    """Read the file; returns callers by the SHA-256 of their keys. Raises `ConfigError`, which quotes no key."""
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise ConfigError(f"HEARTMULA_API_KEYS: {path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"HEARTMULA_API_KEYS: {path}: {error}") from None
    callers: dict[str, Caller] = {}
    names: set[str] = set()
    for entry in found.tenant:
        if not TENANT_NAME.fullmatch(entry.name):
            raise ConfigError(f"HEARTMULA_API_KEYS: {path}: a tenant's name has 1 to 64 letters, digits, - and _")
        if entry.name in names:
            raise ConfigError(f"HEARTMULA_API_KEYS: {path}: there are two tenants {entry.name}")
        names.add(entry.name)
        if entry.burst and not entry.songs_per_minute:
            raise ConfigError(f"HEARTMULA_API_KEYS: {path}: burst of {entry.name} needs songs_per_minute")
        limits = Limits(**{name: getattr(entry, name) for name in Limits.__struct_fields__})
        for digest in entry.keys:
            if not _DIGEST.fullmatch(digest):
                raise ConfigError(
                    f"HEARTMULA_API_KEYS: {path}: keys of {entry.name}: give the SHA-256 of each, 64 lower case "
                    "hexadecimal digits, as `python -m services.gateway.keys new NAME` prints it"
                )
            if digest in callers:
                raise ConfigError(f"HEARTMULA_API_KEYS: {path}: a key of {entry.name} stands there twice")
            callers[digest] = Caller(entry.name, limits)
    return callers


def digest_of_key(key: str) -> str:
    """SHA-256 of a key, as the file holds it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def create_key(tenant: str) -> tuple[str, str]:
    """Make a new random key; returns it with the entry of the file that lets it in as `tenant`."""
    key = f"hm_{secrets.token_urlsafe(32)}"
    return key, f'[[tenant]]\nname = "{tenant}"\nkeys = ["{digest_of_key(key)}"]\n'


class ApiKeys:
    """The keys of one gateway. The file is read again when it has changed."""

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises `ConfigError` for a file that is wrong. `path` None: no key is needed."""
        self._path, self._clock = path, clock
        self._callers = read_keys(path) if path else {}
        self._stamp, self._checked = self._current_stamp(), clock()

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._path is not None

    def caller_with(self, key: str) -> Caller | None:
        """The caller that a key belongs to; None for a key that is not in the file."""
        self._refresh()
        return self._callers.get(digest_of_key(key))

    def caller_named(self, tenant: str) -> Caller | None:
        """The caller with a tenant's name; None where the file has no such tenant, or only one without keys."""
        self._refresh()
        return next((caller for caller in self._callers.values() if caller.tenant == tenant), None)

    def _refresh(self) -> None:
        """Read the file again when it has changed. A wrong one is logged, and the keys stay as they were."""
        now = self._clock()
        if self._path is None or now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        stamp = self._current_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._callers = read_keys(self._path)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.info("keys read again: %d", len(self._callers))

    def _current_stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None
