"""Retries of calls while NATS or the object store is unavailable."""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from shared.errors import Unavailable
from shared.worker.draining import Draining
from shared.worker.job_context import JobContext
from shared.worker.signals import JobStopped

log = logging.getLogger(__name__)

_OUTAGE_SECONDS = 120.0  # for which a server may be away before finished work is dropped and its song given back
_DRAINING_SECONDS = 5.0  # likewise, from when draining began
_PAUSES = (0.5, 5.0)  # seconds between two attempts: at first, and at most

_T = TypeVar("_T")


class Retry:
    """Repeats idempotent calls. Its deadline moves when draining begins, and while a result cannot be stored."""

    def __init__(self, draining: Draining, report: Callable[[str], None]) -> None:
        """`report` publishes why songs wait."""
        self._draining, self._report = draining, report

    async def __call__(self, call: Callable[[], Awaitable[_T]], result_of: JobContext | None = None) -> _T:
        """Call until it succeeds, with growing pauses, while it raises `Unavailable`.

        Raises the latest `Unavailable` once that has lasted for too long. The result of the song `result_of`, however,
        is kept for as long as the object store does not take it and the song is wanted, since no other worker could
        store it either; `JobStopped` is raised when the song is not wanted any more.
        """
        began, pause = time.monotonic(), _PAUSES[0]
        while True:
            try:
                return await call()
            except Unavailable as error:
                if result_of is not None and error.service == "s3":
                    if result_of.stopped:
                        raise JobStopped("the song was cancelled, or is another worker's") from error
                    self._report(f"songs in hand wait, because the object store takes no results: {error}")
                    began = time.monotonic()
                if self._too_long(began):
                    raise
                log.warning("trying again in %g s: %s", pause, error)
                await self._draining.sleep(pause)
                pause = min(2 * pause, _PAUSES[1])

    def _too_long(self, began: float) -> bool:
        if self._draining.active:
            return self._draining.seconds > _DRAINING_SECONDS
        return time.monotonic() - began > _OUTAGE_SECONDS
