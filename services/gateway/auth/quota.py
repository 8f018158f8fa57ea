"""Quotas: how many songs a tenant may ask for, and how many texts a client may have measured."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from services.gateway.auth.api_keys import ApiKeys, Caller, Limits
from services.gateway.auth.token_bucket import TokenBucket
from services.gateway.errors import ApiError
from services.gateway.songs.index import SongIndex
from shared.errors import InvalidRequest
from shared.schema.request import GenerateRequest

_RETRY_SECONDS = 15  # Retry-After for a tenant that has as many songs waiting or running as it may
_TEXTS, _TEXTS_A_SECOND = 20, 4  # texts that are measured at once and in the long run; the page sends two a second
_CLIENTS = 1_000  # for which a token bucket of texts is kept


@dataclass
class _Usage:
    """The use of its limits by one tenant."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    songs: TokenBucket | None = None


class Quotas:
    """Quotas of the tenants of one gateway. They are counted in memory, so two gateways allow twice the rate."""

    def __init__(self, keys: ApiKeys, song_index: SongIndex, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._song_index, self._clock = keys, song_index, clock
        self._usage: dict[str, _Usage] = {}  # by tenant
        self._texts: dict[str, TokenBucket] = {}  # by tenant, or by address where there are no keys

    def lock(self, caller: Caller) -> contextlib.AbstractAsyncContextManager[object]:
        """The lock to hold while songs are counted and accepted, where their number is limited."""
        if caller.limits.songs_at_once is None:
            return contextlib.nullcontext()
        return self._usage_of(caller).lock

    def check(self, caller: Caller, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` for a request that the tenant's limits never allow."""
        limits = caller.limits
        if request.priority == "high" and not limits.priority:
            raise InvalidRequest("priority", "this key does not allow priority high")
        if limits.max_duration_ms is not None and (request.max_duration_ms or 0) > limits.max_duration_ms:
            raise InvalidRequest("max_duration_ms", f"this key allows at most {limits.max_duration_ms} ms")
        for name, most in (("songs_at_once", limits.songs_at_once), ("burst", limits.songs_per_minute and limits.room)):
            if most is not None and request.variants > most:
                raise InvalidRequest("variants", f"this key allows at most {most} ({name})")

    def check_rate(self, caller: Caller, count: int) -> None:
        """Raise the 429 `ApiError` of `take` where it is certain, before the request costs anything; counts nothing."""
        if (bucket := self._songs_bucket(caller)) and (wait := bucket.wait(count, self._clock())):
            raise _too_fast(caller.limits, wait)

    async def take(self, caller: Caller, count: int) -> None:
        """Count new songs against a tenant's limits. Raises a 429 `ApiError`, or `Unavailable`."""
        await self.check_at_once(caller, count)
        if (bucket := self._songs_bucket(caller)) and (wait := bucket.take(count, self._clock())):
            raise _too_fast(caller.limits, wait)

    async def check_at_once(self, caller: Caller, count: int) -> None:
        """Raise the 429 `ApiError` of `take` where with so many more too many would wait or run; counts nothing."""
        if (most := caller.limits.songs_at_once) is None:
            return
        unended = await self._song_index.unended(caller.tenant)
        if unended + count > most:
            detail = f"this key allows {most} songs and recordings waiting or running at once, and {unended} are"
            raise too_many(detail, _RETRY_SECONDS)

    def give_back(self, caller: Caller, count: int) -> None:
        """Undo `take` for songs that were not accepted after all."""
        if bucket := self._usage_of(caller).songs:
            bucket.give_back(count)

    def take_text(self, caller: Caller, address: str) -> None:
        """Count a text that is to be measured, for the tenant, or for the client's address where there are no keys.

        Raises a 429 `ApiError`.
        """
        now = self._clock()
        # Taken out and put in again, so that the client that has been silent for longest stands first.
        name = caller.tenant if self._keys.required else address
        bucket = self._texts.pop(name, None) or TokenBucket(_TEXTS, _TEXTS_A_SECOND, _TEXTS, now)
        self._texts[name] = bucket
        if len(self._texts) > _CLIENTS:
            del self._texts[next(iter(self._texts))]
        if wait := bucket.take(1, now):
            raise too_many(f"at most {_TEXTS_A_SECOND} texts a second are measured", math.ceil(wait))

    def _songs_bucket(self, caller: Caller) -> TokenBucket | None:
        """The tenant's bucket of songs a minute, if they are limited; a full one where its limits changed."""
        limits = caller.limits
        if limits.songs_per_minute is None:
            return None
        usage, room, a_second = self._usage_of(caller), limits.room, limits.songs_per_minute / 60
        if usage.songs is None or (usage.songs.room, usage.songs.a_second) != (room, a_second):
            usage.songs = TokenBucket(room, a_second, room, self._clock())
        return usage.songs

    def _usage_of(self, caller: Caller) -> _Usage:
        return self._usage.setdefault(caller.tenant, _Usage())


def _too_fast(limits: Limits, wait: float) -> ApiError:
    return too_many(f"this key allows {limits.songs_per_minute:g} songs a minute", math.ceil(wait))


def too_many(detail: str, seconds: int) -> ApiError:
    """Make a 429 `ApiError` for a request that may be sent again after some seconds."""
    return ApiError(429, "too-many-requests", detail, headers={"Retry-After": str(seconds)})
