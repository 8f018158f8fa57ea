"""Who may ask for what: API keys, the tenants that they belong to, and what each tenant may have.

Without a file of keys everybody is the tenant "local" and has no limits. The file holds no key, only their SHA-256:
keys are random and long, so nothing slower is needed, and how long a comparison takes tells nothing of a key.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from litestar.connection import ASGIConnection

from services.gateway.auth.origins import is_own
from services.gateway.auth.token_bucket import TokenBucket
from services.gateway.errors import ApiError
from services.gateway.songs.index import SongIndex
from shared.errors import ConfigError, InvalidRequest
from shared.frames import FRAME_MS
from shared.nats.subjects import TENANT
from shared.schema.base import TENANT_NAME
from shared.schema.request import GenerateRequest

log = logging.getLogger(__name__)

COOKIE = "heartmula_key"
COOKIE_SECONDS = 30 * 86400
LOOK_SECONDS = 2.0  # between two looks at the file
_RETRY_SECONDS = 15  # what is told whose songs are all under way
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MEASURES, _MEASURES_A_SECOND = 20, 4  # texts at a stroke and in the long run; the page asks for two a second
_CLIENTS = 1_000  # whose buckets are kept

Connection = ASGIConnection[Any, Any, Any, Any]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tenant may have; None: as much as anybody."""

    songs_per_minute: Annotated[float, msgspec.Meta(gt=0, le=100_000)] | None = None
    burst: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None  # songs at a stroke; None: those of a minute
    songs_at_once: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None  # waiting or running
    max_duration_ms: Annotated[int, msgspec.Meta(ge=FRAME_MS)] | None = None
    priority: bool = True  # whether a song may have priority high

    @property
    def room(self) -> int:
        """Songs that the bucket of `songs_per_minute` holds."""
        return self.burst or max(1, math.ceil(self.songs_per_minute or 1))


@dataclass(frozen=True)
class Caller:
    """Whoever asks."""

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
    """Callers by the SHA-256 of their keys. Raises `ConfigError`, which tells no part of a key."""
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
    """As the file holds it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class _Account:
    """What one tenant has used."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    bucket: TokenBucket | None = None


class Access:
    """The callers of one gateway. What they used is kept in memory: two gateways allow twice the rate."""

    def __init__(self, path: Path | None, song_index: SongIndex, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises `ConfigError` for a file that is wrong. `path` None: no keys."""
        self._path, self._catalogue, self._clock = path, song_index, clock
        self._callers = read_keys(path) if path else {}
        self._stamp, self._looked = self._now_stamp(), clock()
        self._accounts: dict[str, _Account] = {}
        self._measures: dict[str, TokenBucket] = {}  # by tenant, or by address where there are no keys

    @property
    def closed(self) -> bool:
        """Whether a key is needed."""
        return self._path is not None

    def caller(self, connection: Connection) -> Caller:
        """Who asks, by the Authorization header or else the cookie. Raises a 401 `ApiError`."""
        if not self.closed:
            return Caller(TENANT)
        header = connection.headers.get("authorization")
        if header is not None:
            scheme, _, key = header.partition(" ")
            return self._known(key.strip() if scheme.lower() == "bearer" else "")
        # Browsers send a cookie wherever they are told to; the header only a page of ours can set. SameSite keeps other
        # sites out, but not other ports of this host.
        if _from_elsewhere(connection):
            raise _unauthorized()
        return self._known(connection.cookies.get(COOKIE, ""))

    def tenant(self, name: str) -> Caller:
        """A tenant whose right to its name somebody else has checked. Raises a 401 `ApiError`."""
        if not self.closed:
            if name == TENANT:
                return Caller(TENANT)
        else:
            self._look()
            for caller in self._callers.values():
                if caller.tenant == name:
                    return caller
        raise ApiError(401, "unauthorized", "there is no such tenant")

    def _known(self, key: str) -> Caller:
        self._look()
        caller = self._callers.get(digest_of_key(key)) if key else None
        if caller is None:
            raise _unauthorized("this API key is not known" if key else None)
        return caller

    # --- limits

    def turn(self, caller: Caller) -> contextlib.AbstractAsyncContextManager[object]:
        """To be held while songs are counted and taken, where their number is limited."""
        if caller.limits.songs_at_once is None:
            return contextlib.nullcontext()
        return self._account(caller).turn

    def check(self, caller: Caller, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` for what a tenant may never have."""
        limits = caller.limits
        if request.priority == "high" and not limits.priority:
            raise InvalidRequest("priority", "this key does not allow priority high")
        if limits.max_duration_ms is not None and (request.max_duration_ms or 0) > limits.max_duration_ms:
            raise InvalidRequest("max_duration_ms", f"this key allows at most {limits.max_duration_ms} ms")
        for name, most in (("songs_at_once", limits.songs_at_once), ("burst", limits.songs_per_minute and limits.room)):
            if most is not None and request.variants > most:
                raise InvalidRequest("variants", f"this key allows at most {most} ({name})")

    async def admit(self, caller: Caller, count: int) -> None:
        """Count new songs against a tenant's limits. Raises a 429 `ApiError`, or `Unavailable`."""
        limits = caller.limits
        if limits.songs_at_once is not None:
            under_way = await self._catalogue.unended(caller.tenant)
            if under_way + count > limits.songs_at_once:
                raise too_many(
                    f"this key allows {limits.songs_at_once} songs waiting or running at once, and {under_way} are",
                    _RETRY_SECONDS,
                )
        if (bucket := self._bucket(caller)) and (wait := bucket.take(count, self._clock())):
            raise _too_fast(limits, wait)

    def expect(self, caller: Caller, count: int) -> None:
        """Raise the 429 `ApiError` of `admit` where it is certain, before anything is worked out; counts nothing."""
        if (bucket := self._bucket(caller)) and (wait := bucket.wait(count, self._clock())):
            raise _too_fast(caller.limits, wait)

    def give_back(self, caller: Caller, count: int) -> None:
        """Songs that were counted, and not taken after all."""
        if bucket := self._account(caller).bucket:
            bucket.left = min(bucket.room, bucket.left + count)

    def measure(self, caller: Caller, address: str) -> None:
        """Count a text that is to be measured, for the key, or for the client's address. Raises a 429 `ApiError`."""
        now = self._clock()
        # The one that asked last stands last.
        name = caller.tenant if self.closed else address
        bucket = self._measures.pop(name, None) or TokenBucket(_MEASURES, _MEASURES_A_SECOND, _MEASURES, now)
        self._measures[name] = bucket
        if len(self._measures) > _CLIENTS:
            del self._measures[next(iter(self._measures))]
        if wait := bucket.take(1, now):
            raise too_many(f"at most {_MEASURES_A_SECOND} texts a second are measured", math.ceil(wait))

    def _bucket(self, caller: Caller) -> TokenBucket | None:
        """The account of the tenant's songs a minute, if they are limited."""
        limits = caller.limits
        if limits.songs_per_minute is None:
            return None
        account, room, a_second = self._account(caller), limits.room, limits.songs_per_minute / 60
        if account.bucket is None or (account.bucket.room, account.bucket.a_second) != (room, a_second):
            account.bucket = TokenBucket(room, a_second, room, self._clock())
        return account.bucket

    def _account(self, caller: Caller) -> _Account:
        return self._accounts.setdefault(caller.tenant, _Account())

    # --- the file

    def _look(self) -> None:
        """Read the file again when it has changed. A wrong one is logged, and what was read before holds."""
        now = self._clock()
        if self._path is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        stamp = self._now_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._callers = read_keys(self._path)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.info("keys read again: %d", len(self._callers))

    def _now_stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None


def _from_elsewhere(connection: Connection) -> bool:
    """Whether a browser says that a page of another origin asks."""
    origin = connection.headers.get("origin")
    if origin is not None:
        return not is_own(origin, connection.headers.get("host", ""))
    return connection.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")


def _unauthorized(detail: str | None = None) -> ApiError:
    return ApiError(
        401,
        "unauthorized",
        detail or "an API key is needed: send Authorization: Bearer and the key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _too_fast(limits: Limits, wait: float) -> ApiError:
    return too_many(f"this key allows {limits.songs_per_minute:g} songs a minute", math.ceil(wait))


def too_many(detail: str, seconds: int) -> ApiError:
    """The refusal of what may be asked for again after some seconds."""
    return ApiError(429, "too-many-requests", detail, headers={"Retry-After": str(seconds)})
