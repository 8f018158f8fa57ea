"""The codec's stage: token tensor → audio file → object store → completed record."""

import asyncio
import functools
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nats.js import JetStreamContext

from services.codec_worker.encoder import Encoder, encoding
from services.codec_worker.engines.base import CodecEngine
from services.codec_worker.token_fetch import fetch_tokens, token_keys
from shared.audio.files import CONTENT_TYPES, SongTags
from shared.audio.peaks import CONTENT_TYPE as PEAKS_TYPE
from shared.errors import Unavailable
from shared.frames import seconds_of
from shared.jobs.events import DECODING_END, GENERATING_SHARE, decoding, end_event
from shared.jobs.store import JobStore, change
from shared.nats.subjects import DEC, DEC_CONSUMER
from shared.schema.event import Stage
from shared.schema.job import DecodeJob, Job
from shared.settings import Settings
from shared.storage.objects import audio_key, peaks_key
from shared.storage.tempdirs import clear_scratch, scratch_folder
from shared.tracing import span
from shared.worker.job_context import JobContext
from shared.worker.signals import JobStopped, Paused
from shared.worker.stage import StageSpec
from shared.worker.throughput import Throughput
from shared.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

SPEC = StageSpec(
    role="codec",
    status="decoding",
    stream=DEC,
    consumers={"normal": DEC_CONSUMER},
    order=DecodeJob,
    accepts=frozenset({"generating", "decoding"}),  # the tokens are made, even where the record does not say so yet
    weights_label="heartcodec",
)
_SHORT_SECONDS = 0.1  # of decoding, below which the tokens of several songs are fetched ahead
_FINISH_SECONDS = 5.0  # a worker that shuts down finishes a song that needs no longer than this


@dataclass(frozen=True, kw_only=True)
class StoredAudio:
    """The audio of a song in the object store."""

    key: str
    size: int  # bytes
    samples: int  # a channel
    sample_rate: int  # Hz
    frames: int  # 80 ms each, from which it was decoded


class DecodeStage:
    """Runs a codec engine, song by song; the tokens of the next song are fetched meanwhile."""

    spec = SPEC

    def __init__(self, engine: CodecEngine, model: str, settings: Settings) -> None:
        self.model = model
        self.rate = Throughput()
        self._engine = engine
        self._scratch = settings.data_dir / "tmp"
        self._output = settings.output_path
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

    async def run(self, context: JobContext, worker: WorkerContext) -> None:
        """Decode one song, store it and complete its record."""
        job, order, phase = context.job, context.order, context.turn.phase
        assert isinstance(order, DecodeJob)
        codes = await fetch_tokens(job, order, worker.store, worker.jobs)  # int16 [8, T]
        with scratch_folder(self._scratch) as folder:
            path = folder / f"{job.job_id}.{job.request.format}"
            samples, peaks = await worker.in_engine(functools.partial(self._decode, context, worker, codes, path))
            context.off_device.set()
            context.publish(
                Stage(job_id=job.job_id, status="decoding", progress=DECODING_END, stage="storing", phase=phase)
            )
            key = audio_key(job.job_id, context.turn.fencing_token, job.request.format)
            with span("store audio"):
                content_type = CONTENT_TYPES[job.request.format]
                await worker.retry(lambda: worker.store.put_file(key, path, content_type), context)
                await worker.retry(lambda: worker.store.put(peaks_key(key), peaks, PEAKS_TYPE), context)
            if self._output is not None:
                await asyncio.to_thread(_copy, path, self._output)
            size = path.stat().st_size
        audio = StoredAudio(
            key=key, size=size, samples=samples, sample_rate=self._engine.sample_rate, frames=codes.shape[1]
        )
        try:
            done = await worker.retry(lambda: complete(worker.jobs, job, context.turn.fencing_token, audio))
        except JobStopped:
            for stored in (key, peaks_key(key)):
                await worker.store.delete_one(stored)
            raise
        context.publish(end_event(done))
        for key in token_keys(job, order):  # the reconciler finds others, of tokenizers that had lost their lease
            try:
                await worker.store.delete_one(key)
            except Unavailable as error:
                log.warning("%s was not deleted: %s", key, error)

    def _decode(self, context: JobContext, worker: WorkerContext, codes: np.ndarray, path: Path) -> tuple[int, bytes]:
        """Decode int16 `codes` ``[8, T]`` into an audio file, in the engine's thread.

        Returns the number of samples a channel, and the peaks as they are stored. Raises `Paused` before the first
        step; later only when the worker shuts down and much is left to do, because what was decoded would have to be
        decoded again.
        """
        context.check()
        context.check_pause()
        job, request = context.job, context.job.request
        with encoding(path, request.format, self._engine.sample_rate, SongTags.of(request)) as encoder:
            context.turn.place_work("decode", self._engine.work_bytes)
            try:
                context.publish_from_engine(
                    Stage(
                        job_id=job.job_id,
                        status="decoding",
                        progress=GENERATING_SHARE,
                        stage="decoding",
                        phase=context.turn.phase,
                        memory_used=worker.memory_used(),
                    )
                )
                self._run_steps(context, worker, codes, encoder)
            finally:
                context.turn.remove("decode")
            return encoder.samples, encoder.finish()

    def _run_steps(self, context: JobContext, worker: WorkerContext, codes: np.ndarray, encoder: Encoder) -> None:
        """Run all steps of a song and hand its audio to the encoder. However it ends, the engine has let go of it."""
        job, began = context.job, time.monotonic()
        with closing(self._engine.decode(codes, seed=job.request.seed or 0)) as steps:
            while True:
                context.check()
                step = next(steps, None)
                if step is None:
                    break
                if step.audio is not None:
                    encoder.write(step.audio)
                done, total = step.done, step.total
                left = (time.monotonic() - began) / done * (total - done)  # seconds
                if worker.draining.active and left > _FINISH_SECONDS:
                    raise Paused("the worker is shutting down")
                context.progress(functools.partial(decoding, job.job_id, done, total), final=done == total)
        self.rate.add(codes.shape[1], began)
        self.rate.song(codes.shape[1])


async def complete(jobs: JobStore, job: Job, fencing_token: int, audio: StoredAudio) -> Job:
    """Complete a song's record under the fencing token of its turn; may be repeated. Returns the record.

    Raises `JobStopped` when the song no longer belongs to this worker, `JobConflict` when it has no record,
    `Unavailable`.
    """

    def completed(record: Job) -> Job:
        if record.status == "completed" and record.audio_key == audio.key:  # written before, and the answer got lost
            return record
        if record.status != "decoding" or record.fencing_token != fencing_token:
            raise JobStopped(f"the song is {record.status} and no longer belongs to this worker")
        return change(
            record,
            status="completed",
            audio_key=audio.key,
            audio_bytes=audio.size,
            duration_s=seconds_of(audio.samples, audio.sample_rate),
            sample_rate=audio.sample_rate,
            frames=audio.frames,
            tokens_key=None,
            error=None,
        )

    return await jobs.update(job.job_id, job.tenant, completed)


def _copy(path: Path, folder: Path) -> None:
    """Copy a file under another name first, so that programs which watch the folder never see half a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{path.name}.part"
        shutil.copyfile(path, partial)
        partial.replace(folder / path.name)
    except OSError as error:
        # The song is safe in the object store; a full or missing folder must not cost it.
        log.error("HEARTMULA_OUTPUT_PATH: %s was not written there: %s", path.name, error)
