"""Listeners to songs that are being made: where they are in their song, and the reports of them to the workers."""

import logging
import time
from collections.abc import Callable, Collection

import msgspec
from nats.aio.client import Client

from shared.errors import HeartMulaError
from shared.jobs.queues import queue_windows
from shared.model.codec_windows import CodecWindows, can_be_decoded
from shared.nats.errors import nats_errors
from shared.nats.subjects import listen_subject
from shared.schema.job import ENDED, Job
from shared.schema.listening import Listening

log = logging.getLogger(__name__)

LOW_SECONDS = 10.0  # of audio that a listener has left, below which the song's next windows are asked for


class Listener:
    """Where somebody is in a song, as far as a server can know it: players do not say."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._sent = 0.0  # seconds of the song
        self._began: float | None = None

    def begin(self, seconds: float) -> None:
        """Say where the listener begins, in seconds of the song."""
        self._start = self._sent = seconds

    def sent_to(self, seconds: float) -> None:
        """Say up to which second of the song the listener was sent audio."""
        if self._began is None:
            self._began = self._clock()
        self._sent = max(self._sent, seconds)

    @property
    def position(self) -> float:
        """The second of the song that sounds now, if play began with the first byte and went on.

        Never more than was sent: a player that is paused stops reading.
        """
        if self._began is None:
            return self._start
        return min(self._sent, self._start + self._clock() - self._began)


class ListenerReports:
    """Tells the workers who listens, and asks for what a listener will need soon. Nothing is stored, nothing repeated.

    Errors are logged and not raised: without word of listeners songs are made all the same, in another order.
    """

    def __init__(self, nc: Client, windows: CodecWindows | None, gateway: str) -> None:
        """`windows`: None where songs are decoded whole. `gateway` is a name that no other gateway has."""
        self._nc, self._windows, self._gateway = nc, windows, gateway

    async def report(self, job: Job, listeners: Collection[Listener]) -> None:
        """Report the listeners of a song, if it has some and has not ended."""
        if not listeners or job.status in ENDED:
            return
        buffered = max(0.0, job.playable_seconds - max(listener.position for listener in listeners))
        word = Listening(
            job_id=job.job_id, gateway=self._gateway, listeners=len(listeners), buffered=round(buffered, 3)
        )
        try:
            with nats_errors("listeners cannot be reported"):
                await self._nc.publish(listen_subject(job.job_id), msgspec.json.encode(word))
            if buffered < LOW_SECONDS and can_be_decoded(job, self._windows):
                await queue_windows(self._nc, job, listened=True)
        except HeartMulaError as error:
            log.warning("%s: %s", job.job_id, error)
