"""A song that a turn decodes: its tokens, how far it is, and what is published of it."""

import functools
import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np

from services.codec_worker.engines.base import CodecEngine, DecodeState, DecodeStep, KeptWindows
from services.codec_worker.part_store import PartStore
from services.codec_worker.song_record import SongRecord
from services.codec_worker.song_stream import SavedDecode, SongStream
from services.codec_worker.token_fetch import Tokens
from shared.audio.flac import stream_header
from shared.audio.peaks import Peaks
from shared.audio.tags import SongTags
from shared.device.offload_phases import Phase
from shared.errors import ObjectError
from shared.frames import samples_of
from shared.jobs.events import decoding, progress_in_decoding
from shared.schema.event import Stage
from shared.schema.job import Job
from shared.storage.keys import state_key
from shared.worker.job_context import JobContext
from shared.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class SongInWork:
    """One song in one turn."""

    context: JobContext
    worker: WorkerContext
    record: SongRecord
    tokens: Tokens
    kept: KeptWindows  # of the song that it goes on from
    state: DecodeState  # of the engine, after the latest window
    stream: SongStream
    parts: PartStore
    sample_rate: int  # Hz
    announced: bool = False

    @property
    def job_id(self) -> str:
        """The song's id."""
        return self.context.job.job_id

    @property
    def share(self) -> float:
        """Share of the song that is decoded, from 0 to 1."""
        return min(1.0, self.state.samples / samples_of(self.tokens.codes.shape[1], self.sample_rate))

    # Nothing is published of a song whose tokens are still being made, but how much of it can be heard: its stage and
    # its progress are the tokenizer's until then.

    def announce(self) -> None:
        """Publish that the decoding begins; once."""
        if not self.announced:
            self.announced = True
            self._publish("decoding", phase=self.context.turn.phase, memory_used=self.worker.memory_used())

    def announce_pause(self) -> None:
        """Publish that the song waits to be decoded further."""
        self._publish("paused")

    def announce_storing(self) -> None:
        """Publish that all is decoded."""
        self._publish("storing", phase=self.context.turn.phase)

    def _publish(
        self,
        stage: Literal["decoding", "paused", "storing"],
        *,
        phase: Phase | None = None,
        memory_used: int | None = None,
    ) -> None:
        if not self.tokens.ended:
            return
        share = 1.0 if stage == "storing" else self.share
        self.context.publish(
            Stage(
                job_id=self.job_id,
                status="decoding",
                progress=progress_in_decoding(share),
                stage=stage,
                phase=phase,
                memory_used=memory_used,
            )
        )

    def on_step(self, step: DecodeStep, share: float) -> None:
        """Count a step, in the engine's thread; `share` is that of the song before the first of these steps."""
        if not self.tokens.ended:
            self.worker.count_progress()
            return
        before = round(step.total * share / (1 - share)) if share < 1 else 0  # steps of earlier turns
        done, total = before + step.done, before + step.total
        self.context.progress(functools.partial(decoding, self.job_id, done, total), final=done == total)


async def open_song(
    context: JobContext, worker: WorkerContext, record: SongRecord, tokens: Tokens, engine: CodecEngine
) -> SongInWork | None:
    """A song as earlier turns left it, or at its beginning where that cannot be used. Raises as `PartStore.add`.

    None where its tokens, which are being made again, are still fewer than those that were decoded.
    """
    job, rate = context.job, engine.sample_rate
    kept = KeptWindows(seeds=job.parent.seeds if job.parent else (), earlier=tokens.meta.earlier)
    parts = PartStore(context, worker, record, rate)
    saved = None
    if parts.parts:
        try:
            saved = await _saved(job, parts, tokens, kept, worker, engine)
        except ObjectError as error:
            log.warning("%s: decoding begins again, %s", job.job_id, error)
            await parts.begin_again()
    if saved is not None and not tokens.ended and tokens.codes.shape[1] < saved.state.taken:
        return None
    if saved is None:
        saved = SavedDecode(
            engine=engine.identity,
            state=DecodeState(seed=job.request.seed or 0),
            header=stream_header(rate, SongTags.of(job.request)),
            rest=np.zeros((0, 2), np.int16),
            peaks=Peaks(rate),
        )
    stream = SongStream(saved, rate)
    return SongInWork(
        context=context,
        worker=worker,
        record=record,
        tokens=tokens,
        kept=kept,
        state=saved.state,
        stream=stream,
        parts=parts,
        sample_rate=rate,
    )


async def _saved(
    job: Job, parts: PartStore, tokens: Tokens, kept: KeptWindows, worker: WorkerContext, engine: CodecEngine
) -> SavedDecode:
    """What lies beside the last part. Raises `ObjectError` when this song cannot go on with it, `Unavailable`."""
    saved = SavedDecode.unpack(await worker.store.get(state_key(parts.parts[-1].key)))
    if saved.engine != engine.identity:
        raise ObjectError(f"it was begun by another codec ({saved.engine}, not {engine.identity})")
    fewer = not tokens.ended and tokens.codes.shape[1] < saved.state.taken
    if saved.state.seed != (job.request.seed or 0) or not (fewer or saved.state.continues(tokens.codes, kept)):
        raise ObjectError("its tokens are no longer those that were decoded")
    if saved.state.samples - len(saved.rest) != sum(part.samples for part in parts.parts):
        raise ObjectError("its saved state does not belong to its parts")
    return saved
