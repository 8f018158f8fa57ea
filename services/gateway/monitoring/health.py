"""Health: whether a song could be accepted and made. Both servers are probed, workers and queues counted."""

import asyncio
import logging
import math
import time
from datetime import UTC, datetime
from typing import Literal

import msgspec
from nats.js.api import StreamState

from services.gateway.monitoring.diagnostics import diagnose
from services.gateway.monitoring.stale_leases import StaleLeases
from services.gateway.monitoring.stall_detector import TTLS, StallDetector
from services.gateway.monitoring.worker_registry import WorkerRegistry
from services.gateway.monitoring.write_probe import WriteProbe
from shared.aio import end
from shared.causes import NO_ANSWER
from shared.errors import HeartMulaError, NoRoom, NotFound, Unavailable
from shared.nats.connection import Connection
from shared.nats.errors import nats_errors
from shared.nats.streams import recordings_queued, songs_in_lane
from shared.nats.subjects import DEC, INTAKE, TOK
from shared.schema.worker import WorkerStatus
from shared.settings import Settings
from shared.storage.objects import ObjectStore

log = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
_PROBE_EVERY = 5.0  # seconds between two probes that no request asks for
_FRESH_SECONDS = 1.0


class Server(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether a server answers and takes writes."""

    ok: bool
    error: str | None = None


class WorkerCount(msgspec.Struct, frozen=True, kw_only=True):
    """Live workers by role."""

    tokenizer: int
    codec: int


class QueueDepth(msgspec.Struct, frozen=True, kw_only=True):
    """Songs that wait for a stage or are in it, and recordings; None when NATS does not say.

    A song that is decoded while its tokens are still being made is in both.
    """

    tokens: int | None = None
    decode: int | None = None
    encode: int | None = None  # recordings
    intake: int | None = None  # requests that are stored, and not yet submitted

    @property
    def all(self) -> int:
        """All songs and recordings."""
        return (self.tokens or 0) + (self.decode or 0) + (self.encode or 0)


class HealthBody(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/health``."""

    status: Literal["ok", "degraded", "unavailable"]
    nats: Server
    object_store: Server
    workers: WorkerCount
    queue: QueueDepth
    problems: list[str]  # what keeps songs from being accepted or made, in sentences


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one round of probes."""

    taken: float  # monotonic
    nats: Server
    object_store: Server
    workers: list[WorkerStatus]
    queue: QueueDepth
    ages: dict[str, float] = {}  # seconds that the oldest song of each queue has been in it
    decode_full: bool  # no more tokens are made until some are decoded
    stale: list[str] = []  # leases that are no longer renewed, a sentence each
    no_room: str | None = None  # why no further songs are accepted, a sentence
    stalled_seconds: float = 0.0  # seconds for which nothing has moved though songs wait and workers are there
    stalled: str | None = None  # a sentence when that is too long

    @property
    def problems(self) -> list[str]:
        """Sentences about all that keeps songs from being accepted or made."""
        servers = [server.error for server in (self.nats, self.object_store) if server.error]
        full = ["the queue for audio is full: songs wait for their tokens"] if self.decode_full else []
        others = [sentence for sentence in (self.no_room, self.stalled) if sentence]
        # Without NATS it is not known which workers live.
        return servers + full + others + (diagnose(self.workers) + self.stale if self.nats.ok else [])

    @property
    def body(self) -> HealthBody:
        """The answer of ``/health``."""
        count = WorkerCount(**{role: sum(w.role == role for w in self.workers) for role in ("tokenizer", "codec")})
        able, problems = self.nats.ok and self.object_store.ok, self.problems
        return HealthBody(
            status="unavailable" if not able else "degraded" if problems else "ok",
            nats=self.nats,
            object_store=self.object_store,
            workers=count,
            queue=self.queue,
            problems=problems,
        )


class Health:
    """Probes servers, workers and queues, at most once a second however many requests ask."""

    def __init__(self, nc: Connection, store: ObjectStore, workers: WorkerRegistry, settings: Settings) -> None:
        self._nc, self._store, self._workers = nc, store, workers
        self._js = nc.jetstream(timeout=PROBE_SECONDS)
        self._leases = StaleLeases(self._js, settings.lease_ttl, PROBE_SECONDS)
        self._writes = WriteProbe(nc, store)
        self._stalls = StallDetector(TTLS * settings.lease_ttl)
        self._task: asyncio.Task[None] | None = None
        self.store_lost_at: float | None = None  # monotonic; None while it answers
        self._latest: Snapshot | None = None
        self._probing = asyncio.Lock()
        self._ping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to probe in the background."""
        self._writes.start()
        self._task = asyncio.create_task(self._run(), name="health")

    async def close(self) -> None:
        """Stop."""
        await self._writes.close()
        if self._task is not None:
            await end(self._task)

    async def _run(self) -> None:
        while True:
            try:
                await self.snapshot()
            except Exception:
                log.exception("the health probe met an unexpected error")
            await asyncio.sleep(_PROBE_EVERY)

    async def snapshot(self) -> Snapshot:
        """The latest result, at most two seconds old."""
        async with self._probing:
            if self._latest is None or time.monotonic() - self._latest.taken > _FRESH_SECONDS:
                self._latest = await self._probe()
                if self._latest.object_store.ok:
                    self.store_lost_at = None
                elif self.store_lost_at is None:
                    self.store_lost_at = self._latest.taken
            return self._latest

    @property
    def workers(self) -> list[WorkerStatus]:
        """Live workers as of the latest probe."""
        return self._latest.workers if self._latest else []

    async def require_servers(self) -> None:
        """Raise `Unavailable` when a server takes no writes or has no room for a further record.

        Also when the object store was away at the latest probe and still is: a song would only wait.
        """
        if self._writes.no_room:
            raise NoRoom("nats", self._writes.no_room)
        if self._writes.nats:
            raise Unavailable("nats", self._writes.nats)
        if self._latest is not None and not self._latest.object_store.ok:
            found = (await self.snapshot()).object_store
            if not found.ok:
                raise Unavailable("s3", found.error or "the object store does not answer")
        if self._writes.store:
            raise Unavailable("s3", self._writes.store)

    async def _probe(self) -> Snapshot:
        (server, queue, full, ages), store, workers, stale = await asyncio.gather(
            self._probe_nats(), self._probe_store(), self._workers.live(), self._leases.sentences()
        )
        writes, now = self._writes, time.monotonic()
        if server.ok:
            self._stalls.observe(workers, queue.all, now)
        return Snapshot(
            taken=now,
            nats=Server(ok=False, error=writes.nats) if server.ok and writes.nats else server,
            object_store=Server(ok=False, error=writes.store) if store.ok and writes.store else store,
            no_room=writes.no_room,
            stalled_seconds=self._stalls.seconds(now) if server.ok else 0.0,
            stalled=self._stalls.problem(now) if server.ok else None,
            workers=workers,
            queue=queue,
            decode_full=full,
            ages=ages,
            stale=stale,
        )

    async def _probe_nats(self) -> tuple[Server, QueueDepth, bool, dict[str, float]]:
        try:
            with nats_errors("NATS does not answer"):
                async with asyncio.timeout(PROBE_SECONDS):
                    tok, dec, intake = await asyncio.gather(*map(self._js.stream_info, (TOK, DEC, INTAKE)))
                    twice, encode = await self._in_both_lanes(), await recordings_queued(self._js)
                    ages = {"tokens": await self._age(TOK, tok.state), "decode": await self._age(DEC, dec.state)}
        except NotFound:
            missing = "the queues are missing: run `python -m deploy.setup`"
            return Server(ok=False, error=missing), QueueDepth(), False, {}
        except Unavailable as error:
            return Server(ok=False, error=self._nc.trouble or str(error)), QueueDepth(), False, {}
        decode = max(0, dec.state.messages - twice - encode)
        depth = QueueDepth(tokens=tok.state.messages, decode=decode, encode=encode, intake=intake.state.messages)
        return Server(ok=True), depth, dec.state.messages >= (dec.config.max_msgs or math.inf), ages

    async def _in_both_lanes(self) -> int:
        """Songs with a message in both lanes of the queue for audio, such as one that somebody began to listen to."""
        listened = await songs_in_lane(self._js, "high")
        return len(listened & await songs_in_lane(self._js, "normal")) if listened else 0

    async def _age(self, stream: str, state: StreamState) -> float:
        """Seconds since the oldest message of a queue was stored; 0 where there is none."""
        if not state.messages:
            return 0.0
        try:
            with nats_errors("NATS does not answer"):
                oldest = await self._js.get_msg(stream, seq=state.first_seq)
        except NotFound:  # removed meanwhile
            return 0.0
        return max(0.0, (datetime.now(UTC) - oldest.time).total_seconds()) if oldest.time else 0.0

    async def _probe_store(self) -> Server:
        # One ping at a time: each ping of a store that hangs keeps one of the client's threads.
        if self._ping is None or self._ping.done():
            self._ping = asyncio.create_task(self._store.ping())
            self._ping.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await asyncio.shield(self._ping)
        except HeartMulaError as error:
            return Server(ok=False, error=str(error))
        except TimeoutError:
            return Server(ok=False, error=f"no connection to {self._store.where}: {NO_ANSWER}")
        return Server(ok=True)
