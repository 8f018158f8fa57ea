"""The state of a worker that shuts down."""

import asyncio
import logging
import threading
import time

from shared.errors import DeviceBroken

log = logging.getLogger(__name__)


class Draining:
    """Whether the worker is shutting down: it stops at the next step, gives unfinished songs back, then ends.

    `begin` and `sleep` belong to the event loop; `active` may be read from any thread.
    """

    def __init__(self, *wakes: asyncio.Event) -> None:
        """`wakes` are set when draining begins."""
        self.device_broken: DeviceBroken | None = None  # why the process has to end, where that is the reason
        self._wakes = wakes
        self._event = threading.Event()
        self._began = 0.0  # monotonic

    def begin(self, error: DeviceBroken | None = None) -> None:
        """Start to shut down, because of a signal or because the device is broken."""
        log.info("draining")
        self.device_broken = error or self.device_broken
        self._began = time.monotonic()
        self._event.set()
        for wake in self._wakes:
            wake.set()

    @property
    def active(self) -> bool:
        """Whether the worker is shutting down."""
        return self._event.is_set()

    @property
    def seconds(self) -> float:
        """Seconds since draining began; 0 before."""
        return time.monotonic() - self._began if self.active else 0.0

    async def sleep(self, seconds: float) -> None:
        """Sleep, at most half a second longer than until draining begins."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))
            if self.active:
                return
