"""The tokenizer's stage: prompt → frames → token tensor in the object store → decode job."""

import contextlib
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
from nats.js import JetStreamContext

from services.tokenizer_worker.batch import Batch, BatchedSong
from services.tokenizer_worker.engines.base import Song, TokenEngine
from services.tokenizer_worker.saved_tokens import SavedTokens
from services.tokenizer_worker.window_publisher import WindowPublisher
from shared.device.offload_phases import Phase
from shared.errors import LeaseLost, QueueFull, SongError, Unavailable
from shared.frames import frames_nearest, frames_within
from shared.jobs.events import GENERATING_SHARE, generating
from shared.jobs.queues import queue_decode, queue_windows
from shared.jobs.store import change, moved_to_decoding
from shared.model.codec_windows import can_be_decoded, windows_of
from shared.model.prompt import Prompter
from shared.nats.errors import nats_errors
from shared.nats.subjects import DEC, TOK, TOK_CONSUMERS
from shared.schema.event import Stage
from shared.schema.job import Job, TokenJob
from shared.settings import Settings
from shared.worker.handed_on import HandedOn
from shared.worker.job_context import JobContext
from shared.worker.signals import JobStopped, Paused
from shared.worker.stage import StageSpec
from shared.worker.window_policy import margin
from shared.worker.worker_context import WorkerContext

SPEC = StageSpec(
    role="tokenizer",
    status="generating",
    stream=TOK,
    consumers=TOK_CONSUMERS,
    order=TokenJob,
    accepts=frozenset({"queued", "generating"}),  # the song has no tokens yet
    weights_label="heartmula",
)


class TokenStage:
    """Runs a token engine, several songs at once."""

    spec = SPEC

    def __init__(self, engine: TokenEngine, prompter: Prompter, model: str, settings: Settings) -> None:
        self.model = model
        self._engine, self._prompter = engine, prompter
        self._batch = Batch(engine)
        self._windows = windows_of(settings)
        self._handed_on = HandedOn(lambda job: can_be_decoded(job, self._windows))
        self._save_every = max(1, frames_nearest(settings.checkpoint_seconds))
        self.rate = self._batch.rate
        self.load = engine.load
        self.to_device = engine.to_device
        self.to_host = engine.to_host

    @property
    def weight_bytes(self) -> int:
        """Bytes that the engine's weights take on the device."""
        return self._engine.weight_bytes

    @property
    def notes(self) -> Sequence[str]:
        """What the engine does without on this machine."""
        return self._engine.notes

    @property
    def slots(self) -> int:
        """Number of songs that fit the batch, as far as is known."""
        return self._batch.limit

    def song_bytes(self, job: Job) -> int:
        """Bytes that a song's caches take on the device."""
        return self._engine.song_bytes(self._song(job))

    async def obstacle(self, js: JetStreamContext) -> str | None:
        """Whether the decode queue has no room for more songs: better to see that before the device is taken."""
        with nats_errors("the decode queue cannot be looked at"):
            info = await js.stream_info(DEC)
        if info.config.max_msgs and info.state.messages > info.config.max_msgs - self._engine.slots:
            return (
                f"{info.state.messages} songs wait to be decoded, there is no room for more: is a codec worker running?"
            )
        return None

    async def dry_in(self, worker: WorkerContext) -> float | None:
        """Seconds until a listener runs dry whose song waits for the codec; None where none does soon."""
        return await self._handed_on.dry_in(worker.listeners, worker.jobs, within=margin(worker.away()))

    async def run(self, context: JobContext, worker: WorkerContext) -> None:
        """Make the tokens of one song, continuing from the saved ones, and queue the song for decoding."""
        saved = SavedTokens(context, worker.jobs, worker.store, self.model, self._windows, worker.count_progress)
        try:
            codes, ended = await saved.load()  # int16 [8, T]
            if not ended:
                codes = await self._generate(context, worker, saved, codes)
            context.off_device.set()
            if codes.shape[1] == 0:
                raise SongError("the model ended the song before it began: try another seed, other lyrics or tags")
            await worker.retry(lambda: saved.save(codes, ended=True), context)
            await _hand_on(context, saved, codes.shape[1], worker)
            self._handed_on.add(context.job)
        finally:
            await saved.close()

    async def settled(self, context: JobContext, worker: WorkerContext) -> None:
        """Do nothing: the song was handed on before."""

    async def _generate(
        self, context: JobContext, worker: WorkerContext, saved: SavedTokens, before: np.ndarray
    ) -> np.ndarray:
        """Make all tokens of a song, int16 ``[8, T]``, continuing from those made `before`.

        When the song has to leave the device, its tokens are saved before the reason is raised.
        """
        job, song, resumed = context.job, self._song(context.job), before.shape[1]
        phase, memory_used = context.turn.phase, worker.memory_used()
        context.publish(
            _stage_event(context, "generating", resumed, song.max_frames, phase=phase, memory_used=memory_used)
        )
        began = time.monotonic()
        publisher = self._publisher(context, worker, saved, before, song.max_frames)

        def on_frame(batched: BatchedSong) -> None:
            done = len(batched.frames)
            if publisher is not None:
                publisher.made(batched)
            rate = (done - resumed) / max(time.monotonic() - began, 1e-6)
            context.progress(lambda: generating(job.job_id, done, song.max_frames, rate), final=done == song.max_frames)
            if (done - resumed) % self._save_every == 0 and done < song.max_frames:
                batched.future.get_loop().call_soon_threadsafe(saved.save_soon, batched.codes)

        try:
            batched = await self._batch.generate(
                context, song, before, worker.engine, on_frame, returns=lambda: not worker.draining.active
            )
        finally:
            context.off_device.set()
            if publisher is not None:
                await publisher.close()
        await saved.close()
        error, codes = batched.future.exception(), batched.codes
        if isinstance(error, Paused | LeaseLost) and codes.shape[1] > resumed:
            await worker.retry(lambda: saved.save(codes, ended=False), context)
            if publisher is not None:
                await worker.retry(publisher.leave, context)
            context.publish(_stage_event(context, "paused", codes.shape[1], song.max_frames))
        if error is not None:
            raise error
        return codes

    def _publisher(
        self, context: JobContext, worker: WorkerContext, saved: SavedTokens, before: np.ndarray, most: int
    ) -> WindowPublisher | None:
        """The publisher of a song's windows; None where a song of at most `most` frames has none before its end."""
        if self._windows is None or not self._windows.final(most):
            return None
        return WindowPublisher(context, worker, saved, self._windows, self._handed_on, before)

    def _song(self, job: Job) -> Song:
        request = job.request
        return Song(
            prompt=self._prompter.encode(request.tags, request.lyrics),
            max_frames=frames_within(request.max_duration_ms or 0),
            min_frames=job.parent.least_frames if job.parent is not None else 0,
            temperature=request.temperature,
            topk=request.topk,
            cfg_scale=request.cfg_scale,
            seed=request.seed or 0,
        )


def _stage_event(
    context: JobContext,
    stage: Literal["generating", "paused"],
    frames: int,
    total: int,
    *,
    phase: Phase | None = None,
    memory_used: int | None = None,
) -> Stage:
    """The event of a song that is at frame `frames` of at most `total`; `memory_used` in bytes."""
    job_id = context.job.job_id
    return Stage(
        job_id=job_id,
        status="generating",
        progress=generating(job_id, frames, total, None).progress,
        stage=stage,
        phase=phase,
        frames=frames,
        memory_used=memory_used,
    )


async def _hand_on(context: JobContext, saved: SavedTokens, frames: int, worker: WorkerContext) -> None:
    """Publish the decode job, then move the record on.

    In this order, because a song that is published twice is decoded once, and a record that was moved on without a
    message would wait for ever. Where the song waits already, a codec worker may have it that read the record before
    this, and publishing changes nothing: so it is published again after that.
    """
    job, nc, retry = context.job, worker.nc, worker.retry
    listened = worker.listeners.dry_in(job.job_id) is not None
    try:
        published = await retry(lambda: queue_decode(nc, job, saved.key, frames, listened=listened))
    except QueueFull:
        await retry(saved.name_in_record)
        raise Unavailable("nats", "too many songs wait to be decoded") from None  # this ends the turn

    def move_on(record: Job) -> Job:
        if record.status == "completed":  # the codec was quicker
            return record
        if record.status == "decoding":  # the codec began, or a retry
            known = (record.tokens_key, record.frames) == (saved.key, frames)
            return record if known else change(record, tokens_key=saved.key, frames=frames, saved_frames=None)
        if record.status != "generating" or record.fencing_token != context.turn.fencing_token:
            raise JobStopped(f"the song is {record.status} and no longer belongs to this worker")
        return moved_to_decoding(record, saved.key, frames)

    moved = await retry(lambda: worker.jobs.update(job.job_id, job.tenant, move_on))
    context.publish(Stage(job_id=job.job_id, status="decoding", progress=GENERATING_SHARE, stage="waiting"))
    if published is None:
        with contextlib.suppress(QueueFull):  # the reconciler finds a record without a message
            await retry(lambda: queue_windows(nc, moved, listened=listened))
    if moved.tokens_key == saved.key:  # else the codec has made the audio of others, and the record names those
        await saved.delete_older()
