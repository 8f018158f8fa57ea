"""The tokenizer's part in a song: prompt → frames → token tensor in the object store → decode job."""

import time

import numpy as np
from nats.js import JetStreamContext

from services.tokenizer_worker.batch import Batch, Making
from services.tokenizer_worker.engines.base import Song, TokenEngine
from services.tokenizer_worker.saved_tokens import SavedTokens
from shared.errors import LeaseLost, QueueFull, SongError, Unavailable
from shared.frames import frames_nearest, frames_within
from shared.jobs.events import GENERATING_SHARE, generating
from shared.jobs.queues import queue_decode
from shared.jobs.store import change
from shared.model.prompt import Prompter
from shared.nats.subjects import DEC, TOK, TOK_CONSUMERS
from shared.schema.event import Stage
from shared.schema.job import Job, Status, TokenJob
from shared.schema.request import Priority
from shared.schema.worker import Role
from shared.settings import Settings
from shared.worker.job_context import JobContext, JobStopped, Paused
from shared.worker.process import Worker


class TokenStage:
    """Runs a token engine, several songs at once."""

    role: Role = "tokenizer"
    status: Status = "generating"
    stream = TOK
    consumers: dict[Priority, str] = TOK_CONSUMERS
    order = TokenJob
    label = "heartmula"

    def __init__(self, engine: TokenEngine, prompter: Prompter, model: str, settings: Settings) -> None:
        self.model = model
        self._engine, self._prompter = engine, prompter
        self._batch = Batch(engine)
        self._save_every = max(1, frames_nearest(settings.checkpoint_seconds))
        self.rate = self._batch.rate
        self.load = engine.load
        self.to_device = engine.to_device
        self.to_host = engine.to_host

    @property
    def weight_bytes(self) -> int:
        """Of the engine's weights on the device."""
        return self._engine.weight_bytes

    @property
    def slots(self) -> int:
        """Songs that fit the batch as things are."""
        return self._batch.limit

    def song_bytes(self, job: Job) -> int:
        """Of a song's caches."""
        return self._engine.song_bytes(self._song(job))

    def accepts(self, job: Job) -> bool:
        """A song that has no tokens yet."""
        return job.status in ("queued", "generating")

    async def obstacle(self, js: JetStreamContext) -> str | None:
        """Tokens need room in the queue behind; better to see that before the device is taken."""
        info = await js.stream_info(DEC)
        if info.config.max_msgs and info.state.messages > info.config.max_msgs - self._engine.slots:
            return (
                f"{info.state.messages} songs wait to be decoded, there is no room for more: is a codec worker running?"
            )
        return None

    async def work(self, delivery: JobContext, worker: Worker) -> None:
        """Make the tokens of one song, from where they were saved last, and hand them on."""
        saved = SavedTokens(delivery, worker, self.model)
        try:
            codes, ended = await saved.latest()  # int16 [8, T]
            if not ended:
                codes = await self._make(delivery, worker, saved, codes)
            delivery.off_device.set()
            if codes.shape[1] == 0:
                raise SongError("the model ended the song before it began: try another seed, other lyrics or tags")
            await worker.insist(lambda: saved.save(codes, ended=True), delivery)
            await self._hand_on(delivery, worker, saved, codes.shape[1])
        finally:
            await saved.close()

    async def _make(self, delivery: JobContext, worker: Worker, saved: SavedTokens, before: np.ndarray) -> np.ndarray:
        """int16 ``[8, T]`` made before → all of the song's. When it has to leave the device, they are saved first."""
        job, song, resumed = delivery.job, self._song(delivery.job), before.shape[1]
        self._tell(delivery, "generating", resumed, song.max_frames, worker.memory.now)
        began = time.monotonic()

        def on_frame(making: Making) -> None:
            done = len(making.frames)
            rate = (done - resumed) / max(time.monotonic() - began, 1e-6)
            delivery.progress(
                lambda: generating(job.job_id, done, song.max_frames, rate), final=done == song.max_frames
            )
            if (done - resumed) % self._save_every == 0 and done < song.max_frames:
                making.future.get_loop().call_soon_threadsafe(saved.offer, making.codes)

        making = await self._batch.make(delivery, song, before, worker.executor, on_frame)
        delivery.off_device.set()
        await saved.close()
        error, codes = making.future.exception(), making.codes
        if isinstance(error, Paused | LeaseLost) and codes.shape[1] > resumed:
            await worker.insist(lambda: saved.save(codes, ended=False), delivery)
            self._tell(delivery, "paused", codes.shape[1], song.max_frames)
        if error is not None:
            raise error
        return codes

    def _song(self, job: Job) -> Song:
        request = job.request
        return Song(
            prompt=self._prompter.encode(request.tags, request.lyrics),
            max_frames=frames_within(request.max_duration_ms or 0),
            temperature=request.temperature,
            topk=request.topk,
            cfg_scale=request.cfg_scale,
            seed=request.seed or 0,
        )

    def _tell(self, delivery: JobContext, stage: str, frames: int, total: int, memory: int | None = None) -> None:
        delivery.tell(
            Stage(
                job_id=delivery.job.job_id,
                status="generating",
                progress=generating(delivery.job.job_id, frames, total, None).progress,
                stage="paused" if stage == "paused" else "generating",
                phase=delivery.turn.phase if stage == "generating" else None,
                frames=frames,
                memory_used=memory,
            )
        )

    async def _hand_on(self, delivery: JobContext, worker: Worker, saved: SavedTokens, frames: int) -> None:
        """Publish the decode job, then move the record on. In this order, because a song that is published twice is
        decoded once, and a record that was moved on without a message would wait for ever."""
        job = delivery.job
        try:
            await worker.insist(lambda: queue_decode(worker.nc, job, saved.key, frames))
        except QueueFull:
            await worker.insist(saved.name)
            raise Unavailable("nats", "too many songs wait to be decoded") from None  # which ends the turn

        def move_on(record: Job) -> Job:
            if record.status == "completed":  # the codec was quicker than we
                return record
            if record.status == "decoding":
                return record if record.tokens_key == saved.key else change(record, tokens_key=saved.key, frames=frames)
            if record.status != "generating" or record.fencing_token != delivery.turn.fencing_token:
                raise JobStopped(f"the song is {record.status} and no longer ours")
            return change(
                record,
                status="decoding",
                tokens_key=saved.key,
                frames=frames,
                fencing_token=None,
                attempts=0,
                failures=0,
                error=None,
            )

        await worker.insist(lambda: worker.jobs.update(job.job_id, job.tenant, move_on))
        await saved.forget_older()
        delivery.tell(Stage(job_id=job.job_id, status="decoding", progress=GENERATING_SHARE, stage="waiting"))
