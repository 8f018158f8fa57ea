"""Which objects are still needed, by the records of what they belong to."""

import re
import time
from dataclasses import dataclass
from typing import get_args

from shared.jobs.claims import claim_of
from shared.jobs.recordings import recording_id
from shared.schema.base import JOB_ID, TENANT_NAME
from shared.schema.job import Job
from shared.schema.worker import Role
from shared.storage.keys import is_of_stream, kept_tokens_key, keys_with_renditions, part_peaks_key, state_key
from shared.storage.objects import StoredObject

_SHA256 = re.compile(r"[0-9a-f]{64}")


def owner_of(key: str) -> str | None:
    """The id of the song or recording that an object belongs to; None for what is not this system's."""
    match key.split("/"):
        case ["tokens" | "audio", job_id, _] if JOB_ID.fullmatch(job_id):
            return job_id
        case ["recordings", tenant, sha256, _] if TENANT_NAME.fullmatch(tenant) and _SHA256.fullmatch(sha256):
            return recording_id(tenant, sha256)
    return None


@dataclass(frozen=True)
class Keeping:
    """How long is kept what no record says anything of any more."""

    lost_seconds: float  # for finished audio without a record, and tokens beside it
    tokens_seconds: float | None  # for the tokens of a completed song; None: as long as its audio

    def is_needed(self, job: Job | None, item: StoredObject, objects: list[StoredObject]) -> bool:
        """Whether a song or recording needs an object, one of its `objects`, by its record."""
        if item.key.startswith("recordings/"):
            return self._recording_needs(job, item)
        if job is None:
            was_completed = any(_is_finished(found.key) for found in objects)
            tokens = item.key.startswith("tokens/") and was_completed and self._keeps_tokens(item.modified)
            return (tokens or _is_finished(item.key)) and self._keeps_lost(item)
        if job.status in ("failed", "cancelled"):
            return False
        if job.status == "completed":
            if item.key == job.tokens_key:
                return self._keeps_tokens(job.completed_at or job.created_at)
            return job.audio_key is not None and item.key in keys_with_renditions(job.audio_key)
        written_by = item.key.rpartition("/")[2].partition(".")[0]
        turns = {str(claim_of(job, role).fencing_token) for role in get_args(Role)}
        if job.parent is not None and item.key == kept_tokens_key(job.job_id):
            return True
        return item.key == job.tokens_key or item.key in _stream_keys(job) or written_by in turns

    def _recording_needs(self, job: Job | None, item: StoredObject) -> bool:
        """Whether a recording needs an object.

        Its tokens are kept with its record, whatever is set for those of songs: it is there to be gone on from, and
        without them only a further upload would help. Tokens that are not all there serve the encoding alone.
        """
        if job is None:
            return not item.key.endswith(".part") and self._keeps_lost(item)
        if job.status in ("failed", "cancelled"):
            return False
        if job.status == "completed":
            return item.key == job.tokens_key or item.key in keys_with_renditions(job.audio_key or "")
        return True

    def _keeps_lost(self, item: StoredObject) -> bool:
        return item.modified > time.time() - self.lost_seconds

    def _keeps_tokens(self, since: float) -> bool:
        """Whether tokens are still kept of a song that was completed at that time."""
        return self.tokens_seconds is None or since > time.time() - self.tokens_seconds


def _is_finished(key: str) -> bool:
    """Whether an object is the audio of a completed song, or a rendition of it."""
    return key.startswith("audio/") and not is_of_stream(key)


def _stream_keys(job: Job) -> set[str]:
    """Keys of what a song's stream is made of while it grows; the decoding goes on from what is beside the last."""
    parts = [part.key for part in job.decode.parts] if job.decode else []
    return {*parts, *(name(parts[-1]) for name in (state_key, part_peaks_key) if parts)}
