"""A song that grows: the work of a tokenizer and a codec worker, window by window, as a test wants it."""

import functools
import hashlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from nats.js import JetStreamContext

from shared.audio.files import AudioWriter
from shared.audio.flac import BLOCK, encode_blocks, finished_header, stream_header
from shared.audio.forms import plain
from shared.audio.tags import SongTags
from shared.jobs.events import EventPublisher, audible, end_event
from shared.jobs.store import JobStore, change
from shared.nats.subjects import TENANT
from shared.schema.job import AudioPart, Decode, Job, Status
from shared.storage.keys import audio_key, converted_key, part_key
from shared.storage.objects import ObjectStore

FENCE = 5


def music(samples: int, rate: int, seed: int = 0) -> np.ndarray:
    """Two tones that wander, with noise, int16 ``[samples, 2]``."""
    time = np.arange(samples) / rate
    tones = [np.sin(2 * np.pi * (220 + 110 * side) * time + 3 * np.sin(time)) for side in range(2)]
    noise = np.random.default_rng(seed).normal(scale=0.02, size=(samples, 2))
    found: np.ndarray = np.rint((0.4 * np.stack(tones, axis=1) + noise).clip(-1, 1) * 32767).astype(np.int16)
    return found


@dataclass
class GrowingSong:
    """A song in the hands of workers, and what was made of it."""

    js: JetStreamContext
    store: ObjectStore
    job_id: str
    rate: int = 48_000
    fence: int = FENCE
    seed: int = 0
    pcm: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int16))
    stream: bytes = b""  # so far

    def __post_init__(self) -> None:
        self.jobs, self.events = JobStore(self.js), EventPublisher(self.js)

    async def job(self) -> Job:
        """The record."""
        job = await self.jobs.get(self.job_id)
        assert job is not None
        return job

    async def move(self, status: Status, **changes: Any) -> None:
        """Move the record."""
        await self.jobs.update(self.job_id, TENANT, functools.partial(change, status=status, **changes))

    def _more(self, samples: int) -> np.ndarray:
        """The next samples of the song."""
        return music(len(self.pcm) + samples, self.rate, self.seed)[len(self.pcm) :]

    async def window(self, blocks: int) -> AudioPart:
        """Decode a window: store its part, write the record, publish the event."""
        job = await self.job()
        if job.status == "queued":
            await self.move("generating")
        decode = job.decode or Decode(fencing_token=self.fence, sample_rate=self.rate)
        more = self._more(blocks * BLOCK)
        frames = encode_blocks(more, len(self.pcm) // BLOCK, self.rate)
        if not self.stream:
            frames = stream_header(self.rate, SongTags.of(job.request)) + frames
        part = AudioPart(key=part_key(self.job_id, self.fence, len(decode.parts)), size=len(frames), samples=len(more))
        await self.store.put(part.key, frames)
        self.pcm, self.stream = np.concatenate([self.pcm, more]), self.stream + frames
        decode = msgspec.structs.replace(decode, parts=(*decode.parts, part))
        job = await self.jobs.update(self.job_id, TENANT, functools.partial(change, decode=decode))
        await self.events.publish(TENANT, audible(job))
        return part

    async def finish(self, samples: int, *, publish: bool = True, delete_parts: bool = True) -> bytes:
        """Decode the rest and complete the song; returns its FLAC file."""
        job = await self.job()
        await self._to_decoding(job)
        more = self._more(samples)
        header = stream_header(self.rate, SongTags.of(job.request))
        frames = (self.stream or header) + encode_blocks(more, len(self.pcm) // BLOCK, self.rate)
        self.pcm = np.concatenate([self.pcm, more])
        file = finished_header(header, len(self.pcm), hashlib.md5(self.pcm.tobytes()).digest()) + frames[len(header) :]
        self.stream = frames
        key = audio_key(self.job_id, self.fence, job.request.format)
        await self.store.put(converted_key(key, "flac"), file, "audio/flac")
        if job.request.format != "flac":
            await self.store.put(key, self._written(job))
        parts = job.decode.parts if job.decode else ()
        await self._complete(key, len(file))
        if delete_parts:
            for part in parts:
                await self.store.delete_one(part.key)
        if publish:
            await self.events.publish(TENANT, end_event(await self.job()))
        return file

    async def finish_whole(self, samples: int) -> None:
        """Complete a song without parts, in the format that was asked for alone."""
        job = await self.job()
        await self._to_decoding(job)
        self.pcm = self._more(samples)
        file = self._written(job)
        key = audio_key(self.job_id, self.fence, job.request.format)
        await self.store.put(key, file)
        await self._complete(key, len(file))
        await self.events.publish(TENANT, end_event(await self.job()))

    def _written(self, job: Job) -> bytes:
        """The song's file in the format that was asked for."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "song"
            with AudioWriter(path, plain(job.request.format), self.rate, SongTags.of(job.request)) as writer:
                writer.write(self.pcm)
            return path.read_bytes()

    async def _to_decoding(self, job: Job) -> None:
        for status in ("generating", "decoding"):
            if job.status != "decoding":
                await self.move(status)

    async def _complete(self, key: str, size: int) -> None:
        await self.move(
            "completed",
            audio_key=key,
            audio_bytes=size,
            duration_s=len(self.pcm) / self.rate,
            sample_rate=self.rate,
        )
