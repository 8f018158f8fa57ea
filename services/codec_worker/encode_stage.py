"""The encoder's stage: a recording's audio → its tokens, chunk by chunk, each stored before the next begins."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from nats.js import JetStreamContext

from services.codec_worker.encoder.chunks import FRAMES, frame_count, samples_of, whole_frames
from services.codec_worker.engines.base import EncoderEngine, EncodeStep, EncodeSteps
from services.codec_worker.recording_audio import RecordedAudio, fetch_audio, missing_room, scratch_bytes
from services.codec_worker.recording_tokens import RecordingTokens
from shared.device.host_memory import shortage
from shared.device.memory_plan import Placement
from shared.errors import ConfigError, DeviceBroken, JobConflict, SongError
from shared.nats.subjects import DEC, ENC_CONSUMERS
from shared.schema.job import Job, TokenJob
from shared.settings import Settings
from shared.storage.tempdirs import scratch_folder
from shared.worker.draining import Draining
from shared.worker.job_context import JobContext
from shared.worker.outcome import advice
from shared.worker.signals import JobStopped, Paused
from shared.worker.stage import StageSpec
from shared.worker.throughput import Throughput
from shared.worker.window_policy import margin
from shared.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

SPEC = StageSpec(
    role="encoder",
    status="generating",
    stream=DEC,
    consumers=ENC_CONSUMERS,
    order=TokenJob,
    accepts=frozenset({"queued", "generating"}),
    weights_label="encoder",
    may_stay=False,
)
_LABEL = "encode"  # in the device's ledger
_ROOM_SECONDS = 60.0  # for which recordings wait for room on the disk before the device is taken to try again


class EncodeStage:
    """Runs an encoder engine, recording by recording: the next one is claimed when the device is free of this one.

    A recording that was claimed early would share the blame when its worker dies of another one, and fail with it.

    The weights are read when the first recording waits, and then stay in host memory.
    """

    slots = 1
    notes: Sequence[str] = ()

    def __init__(
        self, engine: EncoderEngine, model: str, settings: Settings, placement: Placement, *, host_bytes: int
    ) -> None:
        """`host_bytes` of host memory are needed for the weights, and for the work where it is done there."""
        self.model, self.spec = model, replace(SPEC, refusal=_refusal(engine, placement))
        self.rate = Throughput()
        self._engine, self._host_bytes = engine, host_bytes
        self._scratch = settings.data_dir / "tmp"
        self._identity: str | None = None  # known once the weights are read
        self._broken: str | None = None  # why they cannot be
        self._no_room = (0, 0.0)  # bytes for which the disk had no room, and until when (monotonic) that counts
        self._worked: int | None = None  # fencing token of the latest turn in which some chunks were encoded
        self.to_device = engine.to_device
        self.to_host = engine.to_host

    @property
    def weight_bytes(self) -> int:
        """Bytes that the engine's weights take on the device."""
        return self._engine.weight_bytes

    def song_bytes(self, job: Job) -> int:
        """Bytes that encoding takes on the device: equal for every recording, which is encoded chunk by chunk."""
        return self._engine.work_bytes

    def load(self) -> None:
        """Read nothing yet: most workers never meet a recording."""

    async def obstacle(self, js: JetStreamContext) -> str | None:
        """Read the weights, unless they are there; why they cannot be read, or None.

        Not in the engine's thread, and before the device is taken: songs go on meanwhile.
        """
        if self.spec.refusal is not None:
            return None
        needed, until = self._no_room
        if time.monotonic() < until and (missing := missing_room(self._scratch, needed)):
            return f"recordings wait: {_room_words(needed, missing)}"
        if self._identity is not None:
            return None
        if self._broken is None and (missing := shortage(self._host_bytes)):
            return (
                f"recordings wait: the encoder needs {_gb(self._host_bytes)} of host memory, and {_gb(missing)} of "
                "that are missing: end other programs, or give this worker more"
            )
        if self._broken is None:
            await asyncio.to_thread(self._read)
        return None if self._broken is None else f"recordings wait: {self._broken}; then restart this worker"

    def _read(self) -> None:
        began = time.monotonic()
        try:
            self._engine.load()
            self._identity = self._engine.identity
        except (ConfigError, OSError, MemoryError, RuntimeError) as error:  # songs need this process
            self._broken = str(error) or "there is not enough host memory for its weights"
        else:
            log.info("%s: weights loaded in %.1f s", self.model, time.monotonic() - began)

    async def dry_in(self, worker: WorkerContext) -> float | None:
        """Seconds until a listener to any song runs dry; None where none does soon: recordings have no listeners."""
        soonest = worker.listeners.soonest()
        return None if soonest is None or soonest > margin(worker.away()) else soonest

    async def run(self, context: JobContext, worker: WorkerContext) -> None:
        """Encode what earlier turns have not encoded of a recording, and complete it."""
        assert self._identity is not None
        tokens = RecordingTokens(context, worker, self._identity)
        try:
            codes = await tokens.made_before()
            if codes is None:
                codes = await self._make(context, worker, tokens)
            else:
                context.off_device.set()
            await tokens.complete(codes.shape[1])
        except (JobStopped, JobConflict):
            context.off_device.set()
            await tokens.clear_away()
            raise
        except Exception as error:
            if not isinstance(error, DeviceBroken):  # the lease stays until this process is gone
                context.off_device.set()
            raise
        self.rate.song(codes.shape[1])

    async def settled(self, context: JobContext, worker: WorkerContext) -> None:
        """Do nothing: a recording whose message was acknowledged has its tokens."""

    async def _make(self, context: JobContext, worker: WorkerContext, tokens: RecordingTokens) -> np.ndarray:
        """All codes of a recording that have no padding in them, int16 ``[8, T]``, stored."""

        def check() -> None:
            _check(context, worker.draining)
            self._check_pause(context)

        with scratch_folder(self._scratch) as folder:
            self._require_room(context.job, folder)
            audio = await fetch_audio(context.job, worker.store, folder, check)
            samples = samples_of(audio.samples.shape[1], audio.sample_rate)
            frames = whole_frames(samples)
            if not frames:
                raise SongError("the recording is shorter than a frame, 80 ms: upload a longer one")
            codes = await tokens.begun(frame_count(samples))
            codes = await self._encode(context, worker, tokens, audio, codes)
        context.off_device.set()
        codes = codes[:, :frames]
        await tokens.save_all(codes)
        return codes

    def _require_room(self, job: Job, folder: Path) -> None:
        """Raise `OSError` where a recording's audio would fill the disk, which the servers may share."""
        needed = scratch_bytes(job)
        if missing := missing_room(folder, needed):
            self._no_room = needed, time.monotonic() + _ROOM_SECONDS
            raise OSError(_room_words(needed, missing))

    async def _encode(
        self,
        context: JobContext,
        worker: WorkerContext,
        tokens: RecordingTokens,
        audio: RecordedAudio,
        codes: np.ndarray,
    ) -> np.ndarray:
        """All codes, int16 ``[8, T]``, of which `codes` are there. What is made is stored, but for the last of it."""
        first = codes.shape[1] // FRAMES
        self._check_pause(context)
        context.check()
        context.turn.place_work(_LABEL, self._engine.work_bytes)
        try:
            steps = await worker.in_engine(lambda: self._engine.encode(audio.samples, audio.sample_rate, first=first))
            try:
                while True:
                    made, last = await self._next_codes(context, worker, steps)
                    codes = np.concatenate([codes, made], axis=1)
                    self._worked = context.turn.fencing_token
                    if last:
                        return codes
                    await tokens.save(codes)
                    self._check_pause(context)
            finally:
                await worker.in_engine(steps.close)
        finally:
            context.turn.remove(_LABEL)

    def _check_pause(self, context: JobContext) -> None:
        """Raise `Paused` when the device should be left, and this turn has brought some recording further.

        It always does: else one whose chunk takes longer than a turn would be begun again and again.
        """
        if self._worked == context.turn.fencing_token:
            context.check_pause()

    async def _next_codes(
        self, context: JobContext, worker: WorkerContext, steps: EncodeSteps
    ) -> tuple[np.ndarray, bool]:
        """The codes of the next chunks, and whether these are the last."""
        began = time.monotonic()
        while True:
            step = await worker.in_engine(lambda: _step(context, worker.draining, steps))
            worker.count_progress()
            if step.codes is not None:
                self.rate.add(step.codes.shape[1], began)
                return step.codes, step.done == step.total


def _step(context: JobContext, draining: Draining, steps: EncodeSteps) -> EncodeStep:
    """Compute a step. Raises as `_check`."""
    _check(context, draining)
    return next(steps)


def _check(context: JobContext, draining: Draining) -> None:
    """Raise `Paused` when the worker shuts down, and as `JobContext.check`."""
    context.check()
    if draining.active:
        raise Paused("the worker is shutting down")


def _refusal(engine: EncoderEngine, placement: Placement) -> str | None:
    """Why the encoder can never be used on this device; None where it can."""
    needed = engine.weight_bytes + engine.work_bytes
    if needed <= placement.share:
        return None
    return (
        f"recordings cannot be encoded: the encoder needs {_gb(needed)} of the {_gb(placement.share)} of the device "
        f"that the codec worker may use; {advice('encoder', stays=placement.stays)}"
    )


def _room_words(needed: int, missing: int) -> str:
    return (
        f"unpacking a recording takes {_gb(needed)} of the data folder's disk, and {_gb(missing)} are missing: "
        "free some room"
    )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 10**9:.2f} GB"
