"""A song as the tokenizer leaves it for the codec: its record, its tokens so far, and messages in the codec's queue."""

import io
import time
import uuid
from pathlib import Path

import msgspec
import numpy as np

from services.codec_worker.engines.base import DecodeState, KeptWindows
from services.codec_worker.engines.trivial import TrivialCodec
from shared.audio.files import AudioWriter
from shared.audio.forms import plain
from shared.audio.tags import SongTags
from shared.jobs.continuing import KeptTokens
from shared.jobs.queues import queue_windows
from shared.jobs.store import change
from shared.model.codec_windows import CodecWindows
from shared.nats.subjects import TENANT
from shared.schema.job import Job, Parent
from shared.schema.request import AudioFormat, GenerateRequest
from shared.settings import Settings
from shared.storage.keys import tokens_key
from shared.storage.token_file import EarlierWindow, TokenMeta, pack
from tests.integration.flow import Flow

TURN = 1  # of the tokenizer


class SongBeingMade:
    """One song, whose tokens come bit by bit."""

    def __init__(self, flow: Flow, job: Job, codes: np.ndarray, earlier: tuple[EarlierWindow, ...] = ()) -> None:
        self._flow, self.job, self.codes, self._earlier = flow, job, codes, earlier
        self.job_id = job.job_id
        self.key = tokens_key(job.job_id, TURN)

    @classmethod
    async def begin(
        cls,
        flow: Flow,
        frames: int,
        audio_format: AudioFormat = "flac",
        seed: int = 7,
        kept: KeptTokens | None = None,
    ) -> "SongBeingMade":
        """A song of so many frames, none of which is there yet; it begins with those that are `kept` of another."""
        request = GenerateRequest(
            lyrics="la", tags="piano", seed=seed, max_duration_ms=80 * frames, format=audio_format
        )
        job = Job(
            job_id=str(uuid.uuid4()),
            tenant=TENANT,
            request=request,
            created_at=time.time(),
            status="generating",
            fencing_token=TURN,
            attempts=1,
        )
        codes = np.random.default_rng(seed).integers(0, 64, (8, frames), dtype=np.int16)
        if kept is not None:
            at = kept.codes.shape[1]
            codes[:, :at] = kept.codes
            parent = Parent(job_id="parent", frames=at, least_frames=at, seeds=kept.seeds)
            job = msgspec.structs.replace(job, parent=parent)
        await flow.jobs.create(job)
        return cls(flow, job, codes, kept.earlier if kept is not None else ())

    async def save(self, frames: int, *, ended: bool = False) -> None:
        """Store the first frames."""
        seed = self.job.request.seed or 0
        meta = TokenMeta(job_id=self.job_id, model="m", seed=seed, ended=ended, earlier=self._earlier)
        await self._flow.store.put(self.key, pack(self.codes[:, :frames], meta))

    async def make(self, frames: int, *, listened: bool = False, queue: bool = True) -> None:
        """Store the first frames, tell the record of them, and queue the song for its windows."""
        await self.save(frames)
        await self._note(tokens_key=self.key, saved_frames=frames)
        if queue:
            await self.queue(listened=listened)

    async def end(self, *, queue: bool = True) -> None:
        """Store all frames, and hand the song on."""
        frames = self.codes.shape[1]
        await self.save(frames, ended=True)
        await self._note(
            status="decoding", tokens_key=self.key, frames=frames, fencing_token=None, saved_frames=None, attempts=0
        )
        if queue:
            await self.queue()

    async def queue(self, *, listened: bool = False) -> None:
        """Put the song into the codec's queue."""
        await queue_windows(self._flow.js._nc, await self.record(), listened=listened)

    async def record(self) -> Job:
        """The record as it is now."""
        job = await self._flow.jobs.get(self.job_id)
        assert job is not None
        return job

    async def _note(self, **changes: object) -> None:
        await self._flow.jobs.update(self.job_id, TENANT, lambda job: change(job, **changes))

    async def parts(self, count: int) -> Job:
        """Wait until the record names so many parts."""
        return await self._flow.until(
            self.job_id, lambda job: job.decode is not None and len(job.decode.parts) >= count
        )

    async def stream(self) -> bytes:
        """The bytes of the stream so far."""
        job = await self.record()
        assert job.decode is not None
        return b"".join([await self._flow.store.get(part.key) for part in job.decode.parts])

    async def objects(self) -> list[str]:
        """The names of the song's objects, without their folders."""
        found = [await self._flow.keys(f"{folder}/{self.job_id}/") for folder in ("audio", "tokens")]
        return [key.rpartition("/")[2] for keys in found for key in keys]

    def expected(self, settings: Settings, folder: Path, audio_format: AudioFormat) -> bytes:
        """The file of the song in a format, decoded and written at once by the trivial engine."""
        codec = TrivialCodec(0, windows=CodecWindows(*settings.trivial_window))
        state, parent = DecodeState(seed=self.job.request.seed or 0), self.job.parent
        kept = KeptWindows(seeds=parent.seeds if parent else (), earlier=self._earlier)
        steps = codec.advance(state, self.codes, ended=True, kept=kept)
        path = folder / f"expected.{audio_format}"
        with AudioWriter(path, plain(audio_format), codec.sample_rate, SongTags.of(self.job.request)) as writer:
            writer.write(np.concatenate([step.audio for step in steps if step.audio is not None]))
        return path.read_bytes()


def samples(data: bytes) -> np.ndarray:
    """All samples of an audio file."""
    from shared.audio.reading import read_audio

    return np.concatenate(list(read_audio(io.BytesIO(data))))
