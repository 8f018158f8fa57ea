"""The container of one gateway: opens all parts in order, closes them again, and passes them on one by one."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable

from services.gateway.api.audio_response import AudioResponses
from services.gateway.api.audio_stream import AudioStreams
from services.gateway.api.nats_requests import NatsRequests
from services.gateway.api.reply_subjects import ReplySubjects
from services.gateway.auth.api_keys import ApiKeys, read_keys
from services.gateway.auth.authenticate import Authenticator
from services.gateway.auth.quota import Quotas
from services.gateway.background.deferred import DeferredSongs
from services.gateway.background.reconciler import Reconciler
from services.gateway.background.webhooks.consumer import Webhooks
from services.gateway.compatible.requested_songs import RequestedSongs
from services.gateway.compatible.served_model import ServedModel
from services.gateway.compatible.song_answer import SongAnswers
from services.gateway.events.broadcaster import Broadcaster
from services.gateway.mcp.endpoint import McpEndpoint
from services.gateway.mcp.fetching import Fetcher
from services.gateway.mcp.parts import Parts
from services.gateway.media.encodings import Encodings
from services.gateway.media.growing_songs import GrowingSongs
from services.gateway.media.listeners import ListenerReports
from services.gateway.media.renditions import Renditions
from services.gateway.monitoring.devices import Devices
from services.gateway.monitoring.health import PROBE_SECONDS, Health
from services.gateway.monitoring.metrics import Metrics
from services.gateway.monitoring.worker_registry import WorkerRegistry
from services.gateway.recordings.removal import RecordingRemoval
from services.gateway.recordings.status import Recordings
from services.gateway.recordings.storing import RecordingStore
from services.gateway.recordings.uploads import Uploads
from services.gateway.songs.cancel import Canceller
from services.gateway.songs.eta import EtaEstimator
from services.gateway.songs.event_feed import EventFeeds
from services.gateway.songs.index import SongIndex
from services.gateway.songs.queue_position import QueuePositions
from services.gateway.songs.status import Songs
from services.gateway.songs.tree import Trees
from services.gateway.submission.continuing import Continuations
from services.gateway.submission.intake import Intake
from services.gateway.submission.outage import Outage
from services.gateway.submission.service import Submission
from services.gateway.submission.validation import ModelLimits
from services.gateway.tasks import BackgroundTasks
from shared.errors import ConfigError, HeartMulaError, Unavailable
from shared.jobs.events import EventPublisher
from shared.jobs.store import JobStore
from shared.model.checkpoint import open_checkpoint
from shared.model.codec_windows import windows_of
from shared.model.prompt import Prompter
from shared.nats.connection import Connection, broker, connect
from shared.nats.errors import nats_errors
from shared.nats.streams import require_streams
from shared.settings import Settings, host_name
from shared.storage.objects import ObjectStore
from shared.waiting import wait_until_available

START_PATIENCE = 60.0  # seconds that the servers may take to come up
_CLOSE_PATIENCE = 5.0


class Container:
    """The parts of one gateway. Several gateways may run side by side: none keeps state that another would need."""

    def __init__(
        self,
        settings: Settings,
        nc: Connection,
        store: ObjectStore,
        prompter: Prompter,
        model: ServedModel,
        *,
        can_encode: bool,
    ) -> None:
        """`can_encode`: whether the codec worker has an encoder for recordings."""
        self.settings, self.nc, self.store = settings, nc, store
        self.js = nc.jetstream(timeout=5)
        self.jobs, self.events, self.tasks = JobStore(self.js), EventPublisher(self.js), BackgroundTasks()
        self.metrics = Metrics()
        self.reconciler = Reconciler(nc, store, settings, self.metrics.reconciler)
        self.broadcaster = Broadcaster(nc, self.js, self.metrics.ended)
        self.song_index = SongIndex(nc, self.js)
        self.metrics.deferred.set_function(self.song_index.deferred_now)
        self.webhooks = Webhooks(nc, settings, self.metrics.webhooks)
        keys = ApiKeys(settings.api_keys)
        self.authenticator, self.quotas = Authenticator(keys), Quotas(keys, self.song_index)
        self.renditions = Renditions(store, self.jobs, settings.data_dir / "tmp")
        workers = WorkerRegistry(self.js, PROBE_SECONDS)
        self.health = Health(nc, store, workers, settings)
        self.devices = Devices(self.js, self.health)
        self.outage = Outage(nc, self.health)
        self.eta = EtaEstimator(QueuePositions(nc, self.js), workers)
        self.deferred = DeferredSongs(
            nc, self.jobs, self.song_index, self.events, self.eta, settings.queue_limit, self.tasks.spawn
        )
        self.songs = Songs(self.js, self.jobs, self.song_index, self.broadcaster, self.eta)
        self.trees = Trees(self.songs, self.song_index, self.jobs)
        self.canceller = Canceller(nc, self.songs, self.jobs, self.events, store, self.tasks)
        self.event_feeds = EventFeeds(self.js, self.songs, self.broadcaster, self.eta)
        self.audio = AudioResponses(store, self.jobs, self.renditions, self.tasks)
        gateway_name = f"{host_name()[:24]}-{secrets.token_hex(4)}"
        windows = windows_of(settings)
        reports = ListenerReports(nc, windows, gateway_name)
        self.growing_songs = GrowingSongs(self.jobs, self.broadcaster, reports)
        self.encodings = Encodings(store, self.growing_songs, settings.data_dir / "tmp", self.tasks)
        self.streams = AudioStreams(store, self.growing_songs, self.encodings, self.audio)
        self.model_limits = ModelLimits(prompter)
        self.continuations = Continuations(self.jobs, store, windows)
        self.submission = Submission(
            nc,
            store,
            self.quotas,
            self.model_limits,
            self.continuations,
            self.webhooks,
            self.deferred,
            self.health,
            self.outage,
            self.eta,
            self.metrics,
            self.tasks.spawn,
        )
        self.served_model = model
        self.requested_songs = RequestedSongs(self.submission, self.canceller, self.tasks)
        self.song_answers = SongAnswers(self.requested_songs, self.streams)
        self.recordings = Recordings(self.jobs, self.song_index)
        self.recording_removal = RecordingRemoval(nc, self.recordings, self.jobs, store)
        storing = RecordingStore(nc, self.jobs, store, self.outage)
        self.uploads = Uploads(
            settings, self.quotas, self.health, self.metrics, storing, self.outage, can_encode=can_encode
        )
        self.mcp = McpEndpoint(
            Parts(
                submission=self.submission,
                songs=self.songs,
                canceller=self.canceller,
                event_feeds=self.event_feeds,
                recordings=self.recordings,
                uploads=self.uploads,
                outage=self.outage,
                fetcher=Fetcher(settings),
            )
        )
        replies = ReplySubjects(settings, self.metrics.unanswered)
        self.intake = Intake(nc, self.authenticator, self.submission, self.outage)
        self.nats_requests = NatsRequests(
            nc, self.authenticator, self.submission, self.intake, self.jobs, replies, self.tasks.spawn
        )

    @classmethod
    async def open(cls, settings: Settings, patience: float = START_PATIENCE) -> "Container":
        """Connect and begin to work, waiting for each server for `patience` seconds.

        Raises `ConfigError` for a checkpoint or a file of API keys that cannot be read, `Unavailable` when a server
        does not come up.
        """
        if settings.api_keys:  # a mistake in the file is reported before anything is waited for
            read_keys(settings.api_keys)
        prompter, model, can_encode = await asyncio.to_thread(_open_model, settings)
        server, name = broker(settings), f"gateway-{host_name()[:24]}"
        on_reconnect: list[Callable[[], None]] = []

        async def reconnected() -> None:
            for call in on_reconnect:
                call()

        # pending_size 0: what is published while the connection is lost fails at once, instead of arriving later.
        nc = await wait_until_available(server, lambda: connect(settings, name, reconnected, pending_size=0), patience)
        store = ObjectStore(settings)
        try:
            await wait_until_available(server, lambda: require_streams(nc.jetstream(timeout=5)), patience)
            await wait_until_available(store.where, store.ensure_bucket, patience)
            container = cls(settings, nc, store, prompter, model, can_encode=can_encode)
            await wait_until_available(server, container.broadcaster.start, patience)
            await container.nats_requests.start()
            container.reconciler.start()
            container.health.start()
            container.song_index.start()
            container.deferred.start()
            await container.webhooks.start()
            container.intake.start()
        except BaseException:
            await nc.close()
            store.close()
            raise
        on_reconnect.append(container.broadcaster.reconnect)
        return container

    async def close(self) -> None:
        """Accept no more songs, finish what was begun, and disconnect."""
        self.uploads.close()
        self.streams.close()
        self.requested_songs.close()
        self.encodings.close()
        self.renditions.close()
        await self.mcp.close()
        with contextlib.suppress(Unavailable):
            await self.nats_requests.stop()
        await self.intake.close()
        await self.deferred.close()
        await self.tasks.close(_CLOSE_PATIENCE)
        await self.reconciler.close()
        await self.health.close()
        await self.song_index.close()
        await self.webhooks.close()
        await self.broadcaster.close()
        with contextlib.suppress(HeartMulaError), nats_errors("the connection cannot be closed"):
            await self.nc.close()
        self.store.close()


def _open_model(settings: Settings) -> tuple[Prompter, ServedModel, bool]:
    """What the gateway needs of the checkpoint: tokenizer, name, and whether recordings can be encoded."""
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    can_encode = settings.engine == "trivial" or (settings.engine == "native" and checkpoint.encoder is not None)
    try:
        return Prompter(checkpoint), ServedModel.of(checkpoint), can_encode
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ConfigError(f"{checkpoint.tokenizer_path} cannot be read: {error}") from None
