"""The parts of a song's stream in the object store, and the record that names them."""

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from services.codec_worker.song_record import SongRecord
from shared.audio.peaks import CONTENT_TYPE as PEAKS_TYPE
from shared.errors import Unavailable
from shared.jobs.events import audible
from shared.schema.job import AudioPart, Decode
from shared.storage.keys import part_key, part_peaks_key, state_key
from shared.storage.objects import ObjectStore
from shared.tracing import span
from shared.worker.job_context import JobContext
from shared.worker.signals import JobStopped
from shared.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

_CONTENT_TYPE = "audio/flac"


@dataclass(frozen=True, kw_only=True)
class NewPart:
    """A part that is to be stored, with what goes beside it."""

    data: bytes
    samples: int  # a channel, that it holds
    state: bytes
    peaks: bytes


class PartStore:
    """Stores the parts of one song in one turn."""

    def __init__(
        self,
        context: JobContext,
        worker: WorkerContext,
        record: SongRecord,
        sample_rate: int,
    ) -> None:
        decode = context.job.decode or Decode()
        self.parts = decode.parts  # that the record names
        self._context, self._worker, self._record, self._sample_rate = context, worker, record, sample_rate
        self._number = _next_number(decode)

    async def add(self, new: NewPart) -> None:
        """Store a part and what is beside it; then the record names it, what was beside the last one is deleted.

        Raises `JobStopped` when the song no longer belongs to this worker, and stores nothing then; `JobConflict`,
        `Unavailable`.
        """
        context, worker = self._context, self._worker
        key = part_key(context.job.job_id, context.turn.fencing_token, self._number)
        part = AudioPart(key=key, size=len(new.data), samples=new.samples)
        objects = [
            (key, new.data, _CONTENT_TYPE),
            (state_key(key), new.state, "application/octet-stream"),
            (part_peaks_key(key), new.peaks, PEAKS_TYPE),
        ]
        try:
            with span("store a part"):
                await _all(*(self._put(*item) for item in objects))
            record = await worker.retry(lambda: self._record.add_part(part, self._sample_rate))
        except JobStopped:
            await delete(worker.store, [key for key, *_ in objects])
            raise
        worker.count_progress()
        context.publish(audible(record))
        before, self.parts, self._number = self.parts, (*self.parts, part), self._number + 1
        if before:
            await delete(worker.store, beside(before[-1]))

    async def begin_again(self) -> None:
        """Drop all parts: the next one is the first. Raises as `add`."""
        if self.parts:
            await self._worker.retry(self._record.drop_parts)
            keys = [part.key for part in self.parts] + beside(self.parts[-1])
            self.parts = ()
            await delete(self._worker.store, keys)

    async def _put(self, key: str, data: bytes, content_type: str) -> None:
        await self._worker.retry(lambda: self._worker.store.put(key, data, content_type), self._context)


def beside(part: AudioPart) -> list[str]:
    """The keys of what lies beside the last part."""
    return [state_key(part.key), part_peaks_key(part.key)]


async def delete(store: ObjectStore, keys: Iterable[str]) -> None:
    """Delete objects that nothing needs any more. What cannot be deleted is left to the reconciler."""
    for key in keys:
        try:
            await store.delete_one(key)
        except Unavailable as error:
            log.warning("%s was not deleted: %s", key, error)


def _next_number(decode: Decode) -> int:
    """The number of the next part: in one turn of the worker none is used for other audio, which has the same key."""
    if decode.parts:
        return int(decode.parts[-1].key.split(".")[-2]) + 1
    if decode.sample_rate is not None:  # there were parts, and decoding began again
        return time.time_ns() // 1_000_000
    return 0


async def _all(*calls: object) -> None:
    """Wait for all calls, then raise the first error: none goes on in the background."""
    for result in await asyncio.gather(*calls, return_exceptions=True):  # type: ignore[call-overload]
        if isinstance(result, BaseException):
            raise result
