"""The codec's stage: tokens → windows of audio → parts in the object store, and at the end the finished song."""

import contextlib
import logging
from collections.abc import Sequence
from enum import Enum, auto

from nats.js import JetStreamContext

from services.codec_worker.decoding_loop import DecodingLoop, live_songs_wait
from services.codec_worker.engines.base import CodecEngine
from services.codec_worker.finishing import Finisher
from services.codec_worker.song_in_work import SongInWork, open_song
from services.codec_worker.song_record import SongRecord
from services.codec_worker.song_writer import SongWriter
from services.codec_worker.token_fetch import Tokens, fetch_tokens
from shared.errors import QueueFull, TokensLost
from shared.jobs.queues import queue_windows
from shared.model.codec_windows import can_be_decoded, windows_of
from shared.nats.subjects import DEC, DEC_CONSUMERS
from shared.schema.job import DecodeJob, Job
from shared.settings import Settings
from shared.storage.tempdirs import clear_scratch
from shared.worker.handed_on import HandedOn
from shared.worker.job_context import JobContext
from shared.worker.stage import StageSpec
from shared.worker.throughput import Throughput
from shared.worker.window_policy import margin
from shared.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

SPEC = StageSpec(
    role="codec",
    status="decoding",
    stream=DEC,
    consumers=DEC_CONSUMERS,
    order=DecodeJob,
    accepts=frozenset({"generating", "decoding"}),  # tokens are there, even where the record does not say so yet
    weights_label="heartcodec",
)
_SHORT_SECONDS = 0.1  # of decoding, below which the tokens of several songs are fetched ahead


class _End(Enum):
    """How a turn of a song ended, where it matters once its message is settled."""

    COMPLETED = auto()
    MADE_PLACE = auto()  # for others, although more of it can be decoded


class DecodeStage:
    """Runs a codec engine, song by song; the tokens of the next song are fetched meanwhile."""

    spec = SPEC

    def __init__(self, engine: CodecEngine, model: str, settings: Settings) -> None:
        self.model = model
        self.rate = Throughput()
        self._engine = engine
        self._windows = windows_of(settings)
        self._scratch = settings.data_dir / "tmp"
        self._loop = DecodingLoop(engine, self.rate)
        self._finisher = Finisher(self._loop, settings)
        self._ends: dict[str, _End] = {}  # by song; until its message is settled
        self._in_hand: set[str] = set()  # ids of songs
        self._handed_back = HandedOn(self._needs_tokens)
        self.to_device = engine.to_device
        self.to_host = engine.to_host

    def load(self) -> None:
        """Read the weights, and remove what killed workers left on the disk."""
        clear_scratch(self._scratch)
        self._engine.load()

    @property
    def notes(self) -> Sequence[str]:
        """What the engine does without on this machine."""
        return self._engine.notes

    @property
    def slots(self) -> int:
        """Songs at once: one is decoded while the tokens of the next are fetched.

        Several are fetched only where that takes longer than the decoding, for they are kept from other workers.
        """
        frames, rate = self.rate.song_frames, self.rate.per_second
        return 6 if frames and rate and frames / rate < _SHORT_SECONDS else 2

    @property
    def weight_bytes(self) -> int:
        """Bytes that the engine's weights take on the device."""
        return self._engine.weight_bytes

    def song_bytes(self, job: Job) -> int:
        """Bytes that a decode takes on the device: equal for every song, which is decoded window by window."""
        return self._engine.work_bytes

    async def obstacle(self, js: JetStreamContext) -> str | None:
        """Return None: the codec's stage has no next queue that could be full."""
        return None

    async def dry_in(self, worker: WorkerContext) -> float | None:
        """Seconds until a listener runs dry whose song waits for more tokens; None where none does soon.

        None, too, while the codec has something to decode that somebody listens to.
        """
        if any(worker.listeners.dry_in(job_id) is not None for job_id in self._in_hand):
            return None
        soonest = await self._handed_back.dry_in(worker.listeners, worker.jobs, within=margin(worker.away()))
        return None if soonest is None or await live_songs_wait(worker) else soonest

    def _needs_tokens(self, job: Job) -> bool:
        return job.status == "generating" and not can_be_decoded(job, self._windows)

    async def run(self, context: JobContext, worker: WorkerContext) -> None:
        """Decode what is final of a song after what earlier turns decoded, and complete it when it has ended."""
        job_id = context.job.job_id
        self._ends.pop(job_id, None)
        self._in_hand.add(job_id)
        try:
            await self._run(context, worker)
        finally:
            self._in_hand.discard(job_id)

    async def _run(self, context: JobContext, worker: WorkerContext) -> None:
        record = SongRecord(worker.jobs, context.job, context.turn.fencing_token)
        tokens = await self._tokens(context, worker, record)
        song = await open_song(context, worker, record, tokens, self._engine) if tokens is not None else None
        if tokens is None or song is None:
            await worker.retry(record.uncount_attempt)
            return
        if not tokens.ended:
            end = None if await self._decode_windows(song) else _End.MADE_PLACE
        elif await self._finisher.run(song):
            self.rate.song(tokens.codes.shape[1])
            end = _End.COMPLETED
        else:
            end = _End.MADE_PLACE
        if end is not None:
            self._ends[song.job_id] = end

    async def _tokens(self, context: JobContext, worker: WorkerContext, record: SongRecord) -> Tokens | None:
        """The tokens of a song, as many as there are. None where they cannot be read while they are being made.

        The tokenizer puts the song into the queue again then. Raises `TokensLost` where they were all there, and
        `Unavailable`. A song whose tokens are all there is `decoding` from here on.
        """
        job, order = context.job, context.order
        assert isinstance(order, DecodeJob)
        early = job.status == "generating"
        try:
            tokens = await fetch_tokens(job, order, worker.store, worker.jobs, whole=not early)
        except TokensLost as error:
            if not early:
                raise
            log.info("%s: not decoded yet, %s", job.job_id, error)
            return None
        if early and tokens.ended:
            await worker.retry(lambda: record.move_to_decoding(tokens.key, tokens.codes.shape[1]))
        return tokens

    async def _decode_windows(self, song: SongInWork) -> bool:
        before = song.parts.parts
        was_all = await self._loop.run(song, SongWriter(song.stream, song.parts, None, flac=True))
        if song.parts.parts == before:
            await song.worker.retry(song.record.uncount_attempt)
        self._handed_back.add(song.context.job)
        return was_all

    async def settled(self, context: JobContext, worker: WorkerContext) -> None:
        """Queue the song again where more of it can be decoded by now."""
        claimed = context.job
        end = self._ends.pop(claimed.job_id, None)
        if end is _End.COMPLETED:
            return
        job = await worker.retry(lambda: worker.jobs.get(claimed.job_id, claimed.tenant))
        if job is None:
            return
        listened = worker.listeners.dry_in(claimed.job_id) is not None
        wanted = worker.models_stay or listened
        if end is _End.MADE_PLACE or self._is_waiting(job, claimed, wanted=wanted):
            with contextlib.suppress(QueueFull):  # the reconciler finds a record without a message
                await worker.retry(lambda: queue_windows(worker.nc, job, listened=listened))

    def _is_waiting(self, job: Job, claimed: Job, *, wanted: bool) -> bool:
        """Whether there is something to decode that was not there when the song was `claimed`.

        Windows of a song that still goes on are decoded only where they are `wanted` at once.
        """
        if job.status == "generating":
            # What was there when it was claimed and was not decoded cannot be.
            news = (job.tokens_key, job.saved_frames) != (claimed.tokens_key, claimed.saved_frames)
            if not (wanted and news):
                return False
        return can_be_decoded(job, self._windows)
