"""What the codec writes into a song's record, by compare-and-set, each under the fencing token of its own turn."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from shared.frames import seconds_of
from shared.jobs.claims import claim_of
from shared.jobs.store import JobStore, change, moved_to_decoding
from shared.schema.job import AudioPart, Decode, Job
from shared.worker.signals import JobStopped


@dataclass(frozen=True, kw_only=True)
class StoredAudio:
    """The audio of a song in the object store."""

    key: str
    size: int  # bytes
    samples: int  # a channel
    sample_rate: int  # Hz
    frames: int  # 80 ms each, from which it was decoded


@dataclass(frozen=True)
class SongRecord:
    """The record of one song in one turn of the codec. Its methods may be repeated, and return the new record.

    They raise `JobStopped` when the song no longer belongs to this turn, `JobConflict` when it has no record,
    `Unavailable`.
    """

    jobs: JobStore
    job: Job  # as it was claimed
    fencing_token: int  # of the turn

    async def move_to_decoding(self, tokens_key: str, frames: int) -> Job:
        """Move a song on whose tokens are all there, and whose tokenizer has not said so yet."""

        def moved(record: Job) -> Job:
            self._require(record, "generating", "decoding")
            if record.status == "decoding":
                return record
            return moved_to_decoding(record, tokens_key, frames)

        return await self._update(moved)

    async def add_part(self, part: AudioPart, sample_rate: int) -> Job:
        """Append a part. The song has got further: whatever happened before did not keep it from that."""

        def appended(record: Job) -> Job:
            decode = self._require(record, "generating", "decoding")
            if part in decode.parts:  # written before, and the answer got lost
                return record
            parts = (*decode.parts, part)
            decode = msgspec.structs.replace(decode, attempts=0, sample_rate=sample_rate, parts=parts)
            return change(record, decode=decode)

        return await self._update(appended)

    async def drop_parts(self) -> Job:
        """Take out all parts: decoding begins again."""

        def dropped(record: Job) -> Job:
            decode = self._require(record, "generating", "decoding")
            return change(record, decode=msgspec.structs.replace(decode, parts=())) if decode.parts else record

        return await self._update(dropped)

    async def uncount_attempt(self) -> Job:
        """Take this attempt out again: there was nothing to do, and nothing went wrong."""
        claimed = claim_of(self.job, "codec").attempts

        def uncounted(record: Job) -> Job:
            decode = self._require(record, "generating", "decoding")
            if not decode.attempts or decode.attempts < claimed:
                return record
            return change(record, decode=msgspec.structs.replace(decode, attempts=decode.attempts - 1))

        return await self._update(uncounted)

    async def complete(self, audio: StoredAudio) -> Job:
        """Complete the song. The record goes on naming its tokens, which are kept beside the audio."""

        def completed(record: Job) -> Job:
            if record.status == "completed" and record.audio_key == audio.key:  # written before, the answer got lost
                return record
            self._require(record, "decoding")
            return change(
                record,
                status="completed",
                audio_key=audio.key,
                audio_bytes=audio.size,
                duration_s=seconds_of(audio.samples, audio.sample_rate),
                sample_rate=audio.sample_rate,
                frames=audio.frames,
                error=None,
            )

        return await self._update(completed)

    def _require(self, record: Job, *statuses: str) -> Decode:
        """The codec's stage of a record, if the song is in one of these states and this turn's."""
        if record.status not in statuses or claim_of(record, "codec").fencing_token != self.fencing_token:
            raise JobStopped(f"the song is {record.status} and no longer belongs to this worker")
        assert record.decode is not None  # it has our fencing token
        return record.decode

    async def _update(self, decide: Callable[[Job], Job]) -> Job:
        return await self.jobs.update(self.job.job_id, self.job.tenant, decide)
