"""The tokenizer's part in a song: prompt → frames → token tensor in the object store → decode job."""

import functools
import time

import msgspec
import numpy as np
from nats.js.errors import APIError

from services.tokenizer_worker.engine import Song, TokenEngine
from shared.checkpoint import FRAME_MS
from shared.delivery import Delivery, JobStopped
from shared.errors import SongError
from shared.events import GENERATING_SHARE, generating
from shared.jobs import change
from shared.messages import DecodeJob, Job, Role, Stage, Status, TokenJob
from shared.objects import tokens_key
from shared.prompt import Prompter
from shared.tokens import TokenMeta, pack
from shared.topology import TOK, TOK_CONSUMERS, decode_subject
from shared.worker import Worker

_STREAM_FULL = 10077


class TokenStage:
    """Runs a token engine, song by song."""

    role: Role = "tokenizer"
    status: Status = "generating"
    stream = TOK
    consumers = (TOK_CONSUMERS["high"], TOK_CONSUMERS["normal"])
    wake_subject = "jobs.tok.>"
    order = TokenJob
    label = "heartmula"

    def __init__(self, engine: TokenEngine, prompter: Prompter, model: str) -> None:
        self.model = model
        self._engine, self._prompter = engine, prompter
        self.load = engine.load
        self.to_device = engine.to_device
        self.to_host = engine.to_host

    @property
    def weight_bytes(self) -> int:
        """Of the engine's weights on the device."""
        return self._engine.weight_bytes

    def accepts(self, job: Job) -> bool:
        """A song that has no tokens yet."""
        return job.status in ("queued", "generating")

    async def work(self, delivery: Delivery, worker: Worker) -> None:
        """Make the tokens of one song and hand them on."""
        job = delivery.job
        await delivery.tell(
            Stage(job_id=job.job_id, status="generating", progress=0, stage="generating", phase=delivery.turn.phase)
        )
        codes = await worker.in_engine(functools.partial(self._generate, delivery))  # [8, T]
        if codes.shape[1] == 0:
            raise SongError("the model ended the song before it began: try another seed, other lyrics or tags")
        key = tokens_key(job.job_id, delivery.turn.fence)
        meta = TokenMeta(job_id=job.job_id, model=self.model, seed=job.request.seed or 0)
        await worker.store.put(key, pack(codes, meta))
        try:
            await self._hand_on(delivery, worker, key, codes.shape[1])
        except JobStopped:
            await worker.store.delete(key)
            raise
        await delivery.tell(Stage(job_id=job.job_id, status="decoding", progress=GENERATING_SHARE, stage="waiting"))

    def _generate(self, delivery: Delivery) -> np.ndarray:
        """Runs in the engine's thread. Returns int16 ``[8, T]``."""
        job, request = delivery.job, delivery.job.request
        total = (request.max_duration_ms or 0) // FRAME_MS
        song = Song(
            prompt=self._prompter.encode(request.tags, request.lyrics),
            max_frames=total,
            temperature=request.temperature,
            topk=request.topk,
            cfg_scale=request.cfg_scale,
            seed=request.seed or 0,
        )
        delivery.turn.place_work("kv-cache", self._engine.song_bytes(song))
        frames: list[np.ndarray] = []
        began = time.monotonic()

        def report() -> None:
            done = len(frames)
            rate = done / max(time.monotonic() - began, 1e-6)
            delivery.progress(lambda: generating(job.job_id, done, total, rate), final=done == total)

        try:
            delivery.check()
            self._engine.admit(job.job_id, song)
            while True:
                delivery.check()
                frame = self._engine.step()[job.job_id]
                if frame is None:
                    break
                frames.append(frame)
                report()
        finally:
            self._engine.drop(job.job_id)
            delivery.turn.remove("kv-cache")
        return np.stack(frames, axis=1) if frames else np.zeros((8, 0), np.int16)

    async def _hand_on(self, delivery: Delivery, worker: Worker, key: str, frames: int) -> None:
        """Publish the decode job, then move the record on. In this order, because a song that is published twice is
        decoded once, and a record that was moved on without a message would wait for ever."""
        job = delivery.job
        order = DecodeJob(job_id=job.job_id, tenant=job.tenant, tokens_key=key, first_frame=0, frames=frames, last=True)
        try:
            await worker.js.publish(
                decode_subject(job.job_id), msgspec.json.encode(order), headers={"Nats-Msg-Id": f"{job.job_id}:dec"}
            )
        except APIError as error:
            # One message a subject: tokens of an earlier attempt wait to be decoded already.
            if error.err_code != _STREAM_FULL or "per subject" not in (error.description or ""):
                raise

        def move_on(record: Job) -> Job:
            if record.status in ("decoding", "completed"):  # the codec was quicker than we
                return record
            if record.status != "generating" or record.fence != delivery.turn.fence:
                raise JobStopped(f"the song is {record.status} and no longer ours")
            return change(record, status="decoding", frames=frames, fence=None, attempts=0, error=None)

        await worker.jobs.update(job.job_id, job.tenant, move_on)
