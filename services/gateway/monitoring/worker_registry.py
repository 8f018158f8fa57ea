"""The worker registry: live workers, by their heartbeats."""

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta

from nats.js import JetStreamContext

from shared.errors import HeartMulaError, NotFound, Unreadable
from shared.nats.errors import nats_errors
from shared.nats.streams import WORKER_TTL
from shared.nats.subjects import WORKERS
from shared.schema.decoding import read_heartbeat
from shared.schema.worker import WorkerStatus

log = logging.getLogger(__name__)

_FRESH_SECONDS = 1.0
_STALE_SECONDS = 3.0


class WorkerRegistry:
    """The live workers. Heartbeats are read at most once a second; a caller waits only for a result that is too old."""

    def __init__(self, js: JetStreamContext, patience: float) -> None:
        self._js, self._patience = js, patience
        self._found: list[WorkerStatus] = []
        self._read_at = -_STALE_SECONDS  # monotonic
        self._reading: asyncio.Task[None] | None = None

    async def live(self) -> list[WorkerStatus]:
        """The latest heartbeats of all live workers; none when NATS does not answer."""
        age = time.monotonic() - self._read_at
        if age > _FRESH_SECONDS:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read(), name="workers")
            if age > _STALE_SECONDS:
                await asyncio.shield(self._reading)
        return self._found

    async def _read(self) -> None:
        try:
            with nats_errors("heartbeats cannot be read"):
                async with asyncio.timeout(self._patience):
                    self._found = await _read(self._js)
        except HeartMulaError:
            self._found = []
        self._read_at = time.monotonic()


async def _read(js: JetStreamContext) -> list[WorkerStatus]:
    info = await js.stream_info(f"KV_{WORKERS}", subjects_filter=f"$KV.{WORKERS}.>")
    found = await asyncio.gather(*(_read_worker(js, subject) for subject in sorted(info.state.subjects or {})))
    return [worker for worker in found if worker is not None]


async def _read_worker(js: JetStreamContext, subject: str) -> WorkerStatus | None:
    try:
        with nats_errors("a heartbeat cannot be read"):
            message = await js.get_msg(f"KV_{WORKERS}", subject=subject)
    except NotFound:
        return None
    old = message.time is not None and datetime.now(UTC) - message.time > timedelta(seconds=WORKER_TTL)
    if not message.data or old:
        return None
    try:
        if message.subject != subject:  # the name is a wildcard, which matched another worker's heartbeat
            return None
        return read_heartbeat(subject, message.data)
    except Unreadable as error:
        log.warning("the heartbeat %s cannot be read: %s", subject, error)
        return None
