"""Renditions of the audio of a song or recording, made on request: other formats, and peaks of songs that have none.

They are stored beside the audio, under the same fencing token, and are removed with the song. The work is done in
threads, on files: libsndfile has to seek, and no song is ever held in memory.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from services.gateway.errors import ApiError
from shared.audio.files import AudioWriter
from shared.audio.forms import CONTENT_TYPES, MP3_BIT_RATES, plain
from shared.audio.peaks import CONTENT_TYPE, peaks_of
from shared.audio.reading import read_audio, sample_rate_of
from shared.audio.tags import SongTags
from shared.errors import ObjectError
from shared.jobs.store import JobStore
from shared.schema.job import Job
from shared.schema.request import AudioFormat
from shared.storage.keys import converted_key, peaks_key
from shared.storage.objects import ObjectStore
from shared.storage.tempdirs import clear_scratch, scratch_folder

log = logging.getLogger(__name__)

_MAX_CONVERSIONS = 2
_Make = Callable[[Path, Path], None]  # reads the first file, writes the second


class Renditions:
    """Makes missing renditions, each once: a request for one that is being made waits."""

    def __init__(self, store: ObjectStore, jobs: JobStore, scratch: Path) -> None:
        self._store, self._jobs, self._scratch = store, jobs, scratch
        self._songs: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._free = asyncio.Semaphore(_MAX_CONVERSIONS)
        self._closing = threading.Event()
        clear_scratch(scratch)

    def close(self) -> None:
        """End the work; requests that wait for it are answered with 503."""
        self._closing.set()

    async def converted(self, job: Job, audio: str, wanted: AudioFormat) -> str:
        """Return the key of a song's audio in another format; `audio` is the key of the audio as it was made.

        It is made from the song's FLAC where there is one, without the loss of MP3 and Ogg, as its stream was.

        Raises `ObjectError` when there is no audio or it is damaged, a 422 `ApiError` for a recording whose sample
        rate the format does not have, a 503 one when it cannot be made now.
        """

        def convert(source: Path, target: Path) -> None:
            rate = sample_rate_of(source)
            if wanted == "mp3" and rate not in MP3_BIT_RATES:
                raise ApiError(422, "invalid-request", _no_mp3(rate), field="format")
            with AudioWriter(target, plain(wanted), rate, _tags_of(job)) as writer:
                for block in self._blocks(source):
                    writer.write(block if block.shape[1] == 2 else block.repeat(2, axis=1))  # a recording may be mono

        key, flac = converted_key(audio, wanted), converted_key(audio, "flac")
        source = flac if wanted != "flac" and await self._exists(flac) else audio
        await self._ensure(job, source, key, CONTENT_TYPES[wanted], convert)
        return key

    async def peaks(self, job: Job, audio: str) -> str:
        """Return the key of a song's peaks. Otherwise as `converted`."""

        def measure(source: Path, target: Path) -> None:
            target.write_bytes(peaks_of(self._blocks(source), sample_rate_of(source)))

        key = peaks_key(audio)
        await self._ensure(job, audio, key, CONTENT_TYPE, measure)
        return key

    def _blocks(self, source: Path) -> Iterator[np.ndarray]:
        for block in read_audio(source):
            if self._closing.is_set():
                raise ApiError(503, "unavailable", "the gateway is shutting down; try again")
            yield block

    async def _ensure(self, job: Job, audio: str, key: str, content_type: str, make: _Make) -> None:
        if await self._exists(key):
            return
        lock = self._songs.get(job.job_id)
        if lock is None:
            lock = self._songs[job.job_id] = asyncio.Lock()
        async with lock, self._free:
            if await self._exists(key):
                return
            with scratch_folder(self._scratch) as folder:
                source, target = folder / "source", folder / Path(key).name
                await self._fetch(audio, source)
                try:
                    await asyncio.to_thread(make, source, target)
                except OSError as error:
                    log.error("%s: %s could not be made: %s", job.job_id, target.name, error)
                    raise ApiError(503, "unavailable", "the gateway cannot write files; its log says why") from error
                await self._store.put_file(key, target, content_type)
        # A removal of the song meanwhile did not see this object.
        if await self._jobs.get(job.job_id, job.tenant) is None:
            await self._store.delete_one(key)
            raise ObjectError("the song was removed")
        log.info("%s: made %s", job.job_id, Path(key).name)

    async def _exists(self, key: str) -> bool:
        try:
            await self._store.stat(key)
        except ObjectError:
            return False
        return True

    async def _fetch(self, key: str, path: Path) -> None:
        reader = await self._store.open(key)
        try:
            with path.open("wb") as file:
                async for block in reader:
                    await asyncio.to_thread(file.write, block)
        finally:
            await asyncio.to_thread(reader.close)


def _tags_of(job: Job) -> SongTags:
    """The metadata of a file. Of a recording's request only the title was asked for."""
    if job.recording is None:
        return SongTags.of(job.request)
    return SongTags(title=job.request.title, tags="", lyrics="", seed=None)


def _no_mp3(rate: int) -> str:
    return f"format: MP3 has no sample rate of {rate} Hz, as this recording has; ask for flac, wav or ogg"
