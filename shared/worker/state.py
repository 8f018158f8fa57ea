"""The present state of a worker, as its heartbeats publish it."""

import asyncio
import logging
import time
from typing import Literal

from shared.device.offload_phases import Turn

log = logging.getLogger(__name__)

_PROBLEM_SECONDS = 15.0  # after which a problem that was not reported again is over: its songs were cancelled
_LOADING_SECONDS = 600.0  # for which a model that loads counts as progress


class WorkerState:
    """The state of a worker, written by the turn loop and the job runner, read by the heartbeat.

    Methods belong to the event loop, except `count_progress`.
    """

    def __init__(self) -> None:
        self.changed = asyncio.Event()  # the next heartbeat is sent now
        self.turn: Turn | None = None  # the turn that is being taken
        self.since = time.time()  # when the present activity began
        self.away = 0.0  # seconds for which the device was last away from this worker, as `TurnPolicy.away` counts them
        self._waiting = False
        self._problem: str | None = None
        self._problem_ends = 0.0  # monotonic
        self._progress = 0
        self._loading_since: float | None = None  # monotonic

    @property
    def activity(self) -> Literal["idle", "waiting", "working"]:
        """`waiting` for the device, or `working` on it."""
        return "working" if self.turn else "waiting" if self._waiting else "idle"

    def begin_waiting(self) -> None:
        """Record that the worker begins to wait for the device."""
        self._waiting, self.since = True, time.time()
        self.changed.set()

    def end_waiting(self) -> None:
        """Record that the worker has the device, or gave up waiting for it."""
        self._waiting = False

    def begin_turn(self, turn: Turn) -> None:
        """Record that a turn begins."""
        self.turn, self.since = turn, time.time()

    def end_turn(self) -> None:
        """Record that the turn is over."""
        self.turn, self.since = None, time.time()
        self.changed.set()

    # --- problems

    def report(self, problem: str | None, again_in: float = 0.0) -> None:
        """Publish why no song can be worked on, or with None that the problem is over.

        `again_in` is the number of seconds after which the problem is met again, if it lasts. Where the same one is
        reported twice, the later end counts.
        """
        ends = time.monotonic() + again_in + _PROBLEM_SECONDS
        self._problem_ends = max(ends, self._problem_ends) if problem == self._problem else ends
        if problem != self._problem:
            self._problem = problem
            self.changed.set()
            if problem:
                log.warning("%s", problem)

    @property
    def problem(self) -> str | None:
        """Why no song can be worked on, for users; None when none is known or it was not reported for a while."""
        return self._problem if time.monotonic() < self._problem_ends else None

    # --- progress

    def count_progress(self) -> None:
        """Count a step, a stored object or a finished song. From any thread: a lost count does no harm."""
        self._loading_since = None
        self._progress += 1

    def begin_loading(self) -> None:
        """Record that a model is being moved to the device. For a while that counts as progress by itself."""
        self._loading_since = time.monotonic()

    def end_loading(self) -> None:
        """Record that the model is on the device."""
        self._loading_since = None

    def progress(self) -> int:
        """A number that grows for as long as the worker gets further."""
        if self._loading_since is not None and time.monotonic() - self._loading_since < _LOADING_SECONDS:
            self._progress += 1
        return self._progress
