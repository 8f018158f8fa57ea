"""Everything that answers need, opened once: connections, records, events, and tasks that outlive a request."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any

import nats

from services.gateway.api.nats_requests import NatsRequests
from services.gateway.api.reply_subjects import ReplySubjects
from services.gateway.auth.api_keys import ApiKeys, read_keys
from services.gateway.auth.authenticate import Authenticator
from services.gateway.auth.quota import Quotas
from services.gateway.background.reconciler import Reconciler
from services.gateway.background.webhooks.consumer import Webhooks
from services.gateway.events.broadcaster import Broadcaster
from services.gateway.media.renditions import Renditions
from services.gateway.monitoring.health import PROBE_SECONDS, Health
from services.gateway.monitoring.metrics import Metrics
from services.gateway.monitoring.worker_registry import WorkerRegistry
from services.gateway.songs.eta import EtaEstimator
from services.gateway.songs.index import SongIndex
from services.gateway.songs.queue_position import QueuePositions
from services.gateway.submission.outage import Outage
from services.gateway.submission.service import Submission
from services.gateway.submission.validation import ModelLimits
from shared.aio import end
from shared.errors import ConfigError
from shared.jobs.events import EventPublisher
from shared.jobs.store import JobStore
from shared.model.checkpoint import open_checkpoint
from shared.model.prompt import Prompter
from shared.nats.connection import Connection, broker, connect
from shared.nats.streams import require
from shared.settings import Settings, host_name
from shared.storage.objects import ObjectStore
from shared.waiting import until_there

log = logging.getLogger(__name__)

START_PATIENCE = 60.0  # seconds that the servers may take to come up
_CLOSE_PATIENCE = 5.0


class Gateway:
    """One gateway. Several may run side by side; none keeps anything that another one lacks."""

    def __init__(self, settings: Settings, nc: Connection, store: ObjectStore, prompter: Prompter) -> None:
        self.settings, self.nc, self.store = settings, nc, store
        self.js = nc.jetstream(timeout=5)
        self.jobs, self.events = JobStore(self.js), EventPublisher(self.js)
        self.metrics = Metrics()
        self.reconciler = Reconciler(nc, store, settings, self.metrics.reconciler)
        self.broadcaster = Broadcaster(nc, self.js, self.metrics.ended)
        self.song_index = SongIndex(nc, self.js)
        self.webhooks = Webhooks(nc, settings, self.metrics.webhooks)
        keys = ApiKeys(settings.api_keys)
        self.authenticator, self.quotas = Authenticator(keys), Quotas(keys, self.song_index)
        self.renditions = Renditions(store, self.jobs, settings.data_dir / "tmp")
        workers = WorkerRegistry(self.js, PROBE_SECONDS)
        self.health = Health(nc, store, workers, settings)
        self.outage = Outage(nc, self.health)
        self.eta = EtaEstimator(QueuePositions(nc, self.js), workers)
        self.model_limits = ModelLimits(prompter)
        self.submission = Submission(
            nc,
            self.quotas,
            self.model_limits,
            self.webhooks,
            self.health,
            self.outage,
            self.eta,
            self.metrics,
            self.spawn,
        )
        replies = ReplySubjects(settings, self.metrics.unanswered)
        self._intake = NatsRequests(nc, self.authenticator, self.submission, self.jobs, replies, self.spawn)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        """Whether NATS is there and set up."""
        return self.nc.is_connected

    @classmethod
    async def open(cls, settings: Settings, patience: float = START_PATIENCE) -> "Gateway":
        """Connect, waiting for each server for `patience` seconds.

        Raises `ConfigError` for a checkpoint that cannot be read, `Unavailable` when a server does not come up.
        """
        if settings.api_keys:  # a wrong file is told of before anything is waited for
            read_keys(settings.api_keys)
        prompter = await asyncio.to_thread(_prompter, settings)
        server, name = broker(settings), f"gateway-{host_name()[:24]}"
        opened: list[Gateway] = []

        async def on_reconnect() -> None:
            for gateway in opened:
                gateway.broadcaster.reconnect()

        # pending_size 0: what is published while the connection is lost fails at once, instead of arriving later.
        nc = await until_there(server, lambda: connect(settings, name, on_reconnect, pending_size=0), patience)
        store = ObjectStore(settings)
        try:
            await until_there(server, lambda: require(nc.jetstream(timeout=5)), patience)
            await until_there(store.where, store.ensure_bucket, patience)
            gateway = cls(settings, nc, store, prompter)
            await until_there(server, gateway.broadcaster.start, patience)
            await gateway._intake.start()
            gateway.reconciler.start()
            gateway.health.start()
            gateway.song_index.start()
            await gateway.webhooks.start()
        except BaseException:
            await nc.close()
            store.close()
            raise
        opened.append(gateway)
        return gateway

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that no answer waits for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("unexpected %s", type(error).__name__, exc_info=error)

    async def close(self) -> None:
        """Take no more songs, finish what was begun, and let go."""
        self.renditions.close()
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
            await self._intake.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_PATIENCE)
        await end(*self._tasks)
        await self.reconciler.close()
        await self.health.close()
        await self.song_index.close()
        await self.webhooks.close()
        await self.broadcaster.close()
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
            await self.nc.close()
        self.store.close()


def _prompter(settings: Settings) -> Prompter:
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    try:
        return Prompter(checkpoint)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ConfigError(f"{checkpoint.tokenizer_path} cannot be read: {error}") from None
