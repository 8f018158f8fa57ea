"""Renewal of the lease: a key is written again every quarter of its time to live, until the lease is lost."""

import asyncio
from collections.abc import Awaitable, Callable

from shared.clock import elapsed
from shared.errors import LeaseLost

_RETRY_SECONDS = 0.25


async def keep_renewed(
    ttl: float,
    in_queue: Callable[[], object],
    deadline: Callable[[], float],
    write: Callable[[], Awaitable[bool]],
    lose: Callable[[str], None],
) -> None:
    """Renew a key, that of a holder or a waiter, for as long as it is `in_queue`.

    `ttl` is in seconds; `deadline` is on `shared.clock`, past it `lose` is called with the reason. `write` returns
    False where there was no answer, and the key is then written again soon; it raises `LeaseLost` where the key is
    gone, which ends the renewal.
    """
    pause = ttl / 4
    while in_queue():
        await asyncio.sleep(pause)
        if not in_queue():
            return
        if elapsed() >= deadline():
            lose("it could not be renewed in time")
            return
        try:
            pause = ttl / 4 if await write() else _RETRY_SECONDS
        except LeaseLost:
            return
