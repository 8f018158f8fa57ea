"""Waits for servers: what is missing is logged at once, when it changes, and every half minute."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from shared.aio import end
from shared.causes import NO_ANSWER
from shared.errors import Rejected, Unavailable

log = logging.getLogger(__name__)

_REMIND_SECONDS = 30.0
_SILENT_SECONDS = 1.0  # after which a server that does not answer is logged
_PAUSE_SECONDS = 0.5  # between two attempts
_T = TypeVar("_T")


class ThrottledLog:
    """Logs a sentence, and not again before it changes or half a minute has passed."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._said, self._at = "", 0.0

    def log(self, sentence: str) -> None:
        """Log it, if it is time."""
        now = time.monotonic()
        if sentence != self._said or now - self._at >= _REMIND_SECONDS:
            self._said, self._at = sentence, now
            self._say(sentence)

    def reset(self) -> None:
        """Log the next sentence in any case."""
        self._said = ""


async def wait_until_available(
    what: str, attempt: Callable[[], Awaitable[_T]], patience: float, say: Callable[[str], object] = log.warning
) -> _T:
    """Try something that needs a server until it succeeds; `what` names the server while it does not answer.

    Raises what the attempt raises: `Rejected` at once, since waiting does not help, `Unavailable` after `patience`
    seconds.
    """
    waiting, deadline = ThrottledLog(say), time.monotonic() + patience
    while True:
        trying = asyncio.ensure_future(attempt())
        try:
            while not (await asyncio.wait({trying}, timeout=_SILENT_SECONDS))[0]:
                waiting.log(f"waiting: no connection to {what}: {NO_ANSWER}")
            return trying.result()
        except Rejected:
            raise
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            waiting.log(f"waiting: {error}")
        finally:
            await end(trying)
        await asyncio.sleep(_PAUSE_SECONDS)
