"""The FLAC of a song from its beginning: from its parts while it is made, then from the finished file.

The finished file has the same bytes, but for STREAMINFO: the number of samples and the MD5 in the first 42 bytes.
"""

import logging

from services.gateway.media.growing_songs import AWAY_SECONDS, GrowingSong, StreamCut
from shared.errors import ObjectError
from shared.schema.job import ENDED, AudioPart, Job
from shared.storage.keys import converted_key
from shared.storage.objects import ObjectStore
from shared.waiting import wait_until_available

log = logging.getLogger(__name__)


def flac_key(job: Job) -> str:
    """The key of a finished song's FLAC, if it is stored. Raises `ObjectError` for a song without audio."""
    if job.audio_key is None:
        raise ObjectError("the song has no audio")
    return job.audio_key if job.request.format == "flac" else converted_key(job.audio_key, "flac")


class FlacStream:
    """The bytes of a song's FLAC, for one reader. Nothing is kept open between two reads.

    Methods raise `StreamCut` where the bytes that were read do not go on, `Unavailable` where the store does not answer
    for a minute, `ObjectError` where the finished audio is gone.
    """

    def __init__(self, store: ObjectStore, song: GrowingSong, edition: str | None, *, any_format: bool = False) -> None:
        """`edition` is that of the audio to read; `any_format`: a song finished without FLAC is read as it was made."""
        self._store, self._song, self._any_format = store, song, any_format
        self.edition = edition
        self._parts: tuple[AudioPart, ...] = ()  # as of the latest look
        self.rate = 0  # Hz, once there are parts
        self._finished: tuple[str, int] | None = None  # key and size

    @property
    def size(self) -> None:
        """Unknown while the song is made; a finished song is answered with its file."""

    async def reach(self, offset: int) -> int:
        """Wait until there are more than `offset` bytes; returns how many there are, fewer after the song's end."""
        while True:
            job = self._look()
            if job.status == "completed":
                return (await self._file(job))[1]
            if job.status in ENDED:
                return 0
            if (size := sum(part.size for part in self._parts)) > offset:
                return size
            await self._song.news()

    async def read(self, offset: int, most: int) -> bytes:
        """Read up to `most` bytes from an offset that was reached; none where the song ended without being finished."""
        try:
            return await self._read(offset, most)
        except ObjectError:  # a part is gone: the song was completed meanwhile, or is decoded again
            await self._song.look()
            return await self._read(offset, most)

    def seconds(self, offset: int) -> float:
        """The second of the song that is at an offset, as nearly as its parts say."""
        begin = samples = 0
        for part in self._parts:
            if offset <= begin + part.size:
                return (samples + part.samples * (offset - begin) / part.size) / self.rate
            begin, samples = begin + part.size, samples + part.samples
        return samples / self.rate if self.rate else 0.0

    def boundary(self, sample: int) -> tuple[int, int]:
        """The end of the last part before a sample, as far as parts are known: offset, and samples up to there."""
        offset = samples = 0
        for part in self._parts:
            if samples + part.samples > sample:
                break
            offset, samples = offset + part.size, samples + part.samples
        return offset, samples

    def _look(self) -> Job:
        """The record, if it is still that of this edition."""
        job = self._song.job
        if job.edition != self.edition:
            raise StreamCut("the song is decoded again from its beginning")
        if job.decode is not None:
            self._parts, self.rate = job.decode.parts, job.decode.sample_rate or 0
        return job

    async def _read(self, offset: int, most: int) -> bytes:
        job = self._look()
        if job.status == "completed":
            return await self._bytes((await self._file(job))[0], offset, most)
        if job.status in ENDED:
            return b""
        begin = 0
        for part in self._parts:
            if offset < begin + part.size:
                return await self._bytes(part.key, offset - begin, min(most, begin + part.size - offset))
            begin += part.size
        raise StreamCut("audio of the song is gone")

    async def _file(self, job: Job) -> tuple[str, int]:
        """Key and size of the finished file."""
        if self._finished is None:
            try:
                self._finished = await self._stat(flac_key(job))
            except ObjectError:
                if not self._any_format or self._parts or job.audio_key is None:
                    raise
                self._finished = await self._stat(job.audio_key)
        return self._finished

    async def _stat(self, key: str) -> tuple[str, int]:
        found = await wait_until_available(self._store.where, lambda: self._store.stat(key), AWAY_SECONDS, log.debug)
        return key, found.size

    async def _bytes(self, key: str, offset: int, length: int) -> bytes:
        found = await wait_until_available(
            self._store.where, lambda: self._store.get(key, offset, length), AWAY_SECONDS, log.debug
        )
        if not found:
            raise ObjectError(f"{key} is shorter than it was")
        return found
