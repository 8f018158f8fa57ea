"""The codec's part in a song: token tensor → audio file → object store → completed."""

import asyncio
import functools
import logging
import shutil
import time
from pathlib import Path

import numpy as np
from nats.js import JetStreamContext

from services.codec_worker.engines.base import CodecEngine
from shared.audio.files import CONTENT_TYPES, AudioWriter, SongTags
from shared.audio.peaks import CONTENT_TYPE as PEAKS_TYPE
from shared.audio.peaks import Peaks
from shared.errors import ObjectError, TokensLost, Unavailable
from shared.frames import seconds_of
from shared.jobs.events import DECODING_END, GENERATING_SHARE, decoding, end_event
from shared.jobs.store import JobStore, change
from shared.nats.subjects import DEC, DEC_CONSUMER
from shared.schema.event import Stage
from shared.schema.job import DecodeJob, Job, Status
from shared.schema.request import Priority
from shared.schema.worker import Role
from shared.settings import Settings
from shared.storage.objects import ObjectStore, audio_key, peaks_key
from shared.storage.tempdirs import clear_scratch, scratch_folder
from shared.storage.token_file import unpack
from shared.tracing import span
from shared.worker.job_context import JobContext, JobStopped, Paused
from shared.worker.process import Worker
from shared.worker.throughput import Throughput

log = logging.getLogger(__name__)

_SHORT_SECONDS = 0.1
_FINISH_SECONDS = 5.0  # a worker that shuts down finishes a song that needs no longer than this


class DecodeStage:
    """Runs a codec engine, song by song; the tokens of the next one are fetched meanwhile."""

    role: Role = "codec"
    status: Status = "decoding"
    stream = DEC
    consumers: dict[Priority, str] = {"normal": DEC_CONSUMER}  # noqa: RUF012
    order = DecodeJob
    label = "heartcodec"

    def __init__(self, engine: CodecEngine, model: str, settings: Settings) -> None:
        self.model = model
        self.rate = Throughput()
        self._engine = engine
        self._scratch = settings.data_dir / "tmp"
        self._output = settings.output_path
        self.to_device = engine.to_device
        self.to_host = engine.to_host

    def load(self) -> None:
        """Read the weights; and remove what killed workers left on the disk."""
        clear_scratch(self._scratch)
        self._engine.load()

    @property
    def slots(self) -> int:
        """One song is decoded and the tokens of the next are fetched; of more only where that takes longer than the
        decoding, for they are kept from other workers."""
        frames, rate = self.rate.song_frames, self.rate.per_second
        return 6 if frames and rate and frames / rate < _SHORT_SECONDS else 2

    @property
    def weight_bytes(self) -> int:
        """Of the engine's weights on the device."""
        return self._engine.weight_bytes

    def song_bytes(self, job: Job) -> int:
        """The same for every song: it is decoded window by window."""
        return self._engine.work_bytes

    def accepts(self, job: Job) -> bool:
        """A song whose tokens are made: its decode job says so, even where its record does not yet."""
        return job.status in ("generating", "decoding")

    async def obstacle(self, js: JetStreamContext) -> str | None:
        """Nothing can be."""
        return None

    async def work(self, delivery: JobContext, worker: Worker) -> None:
        """Decode one song, store it and complete its record."""
        job, order, phase = delivery.job, delivery.order, delivery.turn.phase
        assert isinstance(order, DecodeJob)
        codes = await fetch_tokens(job, order, worker.store, worker.jobs)  # int16 [8, T]
        with scratch_folder(self._scratch) as folder:
            path = folder / f"{job.job_id}.{job.request.format}"
            samples, peaks = await worker.in_engine(functools.partial(self._decode, delivery, worker, codes, path))
            delivery.off_device.set()
            delivery.tell(
                Stage(job_id=job.job_id, status="decoding", progress=DECODING_END, stage="storing", phase=phase)
            )
            key = audio_key(job.job_id, delivery.turn.fencing_token, job.request.format)
            with span("store audio"):
                await worker.insist(
                    lambda: worker.store.put_file(key, path, CONTENT_TYPES[job.request.format]), delivery
                )
                await worker.insist(lambda: worker.store.put(peaks_key(key), peaks, PEAKS_TYPE), delivery)
            if self._output is not None:
                await asyncio.to_thread(_copy, path, self._output)
            size = path.stat().st_size
        try:
            done = await worker.insist(lambda: self._complete(delivery, worker, key, size, samples, codes.shape[1]))
        except JobStopped:
            for made in (key, peaks_key(key)):
                await worker.store.delete_one(made)
            raise
        delivery.tell(end_event(done))
        for key in _named(job, order):  # the sweeper finds others, of tokenizers that came late
            try:
                await worker.store.delete_one(key)
            except Unavailable as error:
                log.warning("%s was not deleted: %s", key, error)

    def _decode(self, delivery: JobContext, worker: Worker, codes: np.ndarray, path: Path) -> tuple[int, bytes]:
        """Runs in the engine's thread. Returns the number of samples a channel, and the peaks as they are stored.

        Raises `Paused` before the first step; later only when the worker shuts down and much is left to do, because
        what was decoded would have to be decoded again.
        """
        delivery.check()
        delivery.check_pause()
        job, request = delivery.job, delivery.job.request
        delivery.turn.place_work("decode", self._engine.work_bytes)
        delivery.tell_from_engine(
            Stage(
                job_id=job.job_id,
                status="decoding",
                progress=GENERATING_SHARE,
                stage="decoding",
                phase=delivery.turn.phase,
                memory_used=worker.memory.now,
            )
        )
        samples, began = 0, time.monotonic()
        peaks = Peaks(self._engine.sample_rate)
        try:
            with AudioWriter(path, request.format, self._engine.sample_rate, SongTags.of(request)) as writer:
                steps = self._engine.decode(codes, seed=request.seed or 0)
                while True:
                    delivery.check()
                    step = next(steps, None)
                    if step is None:
                        self.rate.add(codes.shape[1], began)
                        self.rate.song(codes.shape[1])
                        return samples, peaks.json()
                    if step.audio is not None:
                        writer.write(step.audio)
                        peaks.add(step.audio)
                        samples += len(step.audio)
                    done, total = step.done, step.total
                    if worker.draining and (time.monotonic() - began) / done * (total - done) > _FINISH_SECONDS:
                        raise Paused("the worker is shutting down")
                    delivery.progress(functools.partial(decoding, job.job_id, done, total), final=done == total)
        finally:
            delivery.turn.remove("decode")

    async def _complete(
        self, delivery: JobContext, worker: Worker, key: str, size: int, samples: int, frames: int
    ) -> Job:
        job, rate = delivery.job, self._engine.sample_rate

        def complete(record: Job) -> Job:
            if record.status == "completed" and record.audio_key == key:  # we wrote it, and the answer got lost
                return record
            if record.status != "decoding" or record.fencing_token != delivery.turn.fencing_token:
                raise JobStopped(f"the song is {record.status} and no longer ours")
            return change(
                record,
                status="completed",
                audio_key=key,
                audio_bytes=size,
                duration_s=seconds_of(samples, rate),
                sample_rate=rate,
                frames=frames,
                tokens_key=None,
                error=None,
            )

        return await worker.jobs.update(job.job_id, job.tenant, complete)


async def fetch_tokens(job: Job, order: DecodeJob, store: ObjectStore, jobs: JobStore) -> np.ndarray:
    """All tokens of a song, int16 ``[8, T]``, by its record as it was claimed and its message.

    The message may be of a tokenizer that had lost its lease, and its tokens deleted since. The record may have been
    claimed before it was moved on, and name a checkpoint. So the first tokens that are whole are taken; when none are,
    a tokenizer may have moved the record on after the claim. Raises `TokensLost` or `Unavailable`.
    """
    try:
        return await _first_whole(job, order, store)
    except TokensLost:
        now = await jobs.get(job.job_id, job.tenant)
        if now is None or (now.tokens_key == job.tokens_key and now.frames == job.frames):
            raise
        return await _first_whole(now, order, store)


async def _first_whole(job: Job, order: DecodeJob, store: ObjectStore) -> np.ndarray:
    wrong = []
    for key in _named(job, order):
        try:
            codes, meta = unpack(await store.get(key), job.job_id)
        except ObjectError as error:
            wrong.append(str(error))
            continue
        if meta.ended:
            return codes
        wrong.append(f"the token file holds the first {codes.shape[1]} frames only")
    raise TokensLost("; ".join(wrong))


def _named(job: Job, order: DecodeJob) -> list[str]:
    """Keys of the song's tokens, those of the record first."""
    return list(dict.fromkeys(key for key in (job.tokens_key, order.tokens_key) if key is not None))


def _copy(path: Path, folder: Path) -> None:
    """Copy under another name first: whoever watches the folder must not see half a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{path.name}.part"
        shutil.copyfile(path, partial)
        partial.replace(folder / path.name)
    except OSError as error:
        # The song is safe in the object store; a full or missing folder must not cost it.
        log.error("HEARTMULA_OUTPUT_PATH: %s was not written there: %s", path.name, error)
