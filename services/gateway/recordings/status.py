"""The state of recordings as users see it: one recording, or a page of them."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from services.gateway.errors import unknown_recording
from services.gateway.songs.index import Place, SongIndex, cursor_of
from services.gateway.songs.status import read_records
from shared.frames import frames_within
from shared.jobs.store import JobStore
from shared.schema.base import JOB_ID, timestamp
from shared.schema.job import Job, Status
from shared.schema.request import AudioFormat

RecordingStatus = Literal["queued", "encoding", "ready", "failed"]
RECORD_STATUS: dict[RecordingStatus, Status] = {  # what records call it
    "queued": "queued",
    "encoding": "generating",
    "ready": "completed",
    "failed": "failed",
}
_SHOWN = {status: shown for shown, status in RECORD_STATUS.items()}
_MOST_CHILDREN = 100  # that are named; others can be listed


class RecordingBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A recording."""

    recording_id: str
    status: RecordingStatus
    progress: Annotated[float, Meta(description="0–100, of the encoding")]
    created_at: str  # RFC 3339, as all times here
    completed_at: str | None  # when it was ready, or failed
    duration: Annotated[float, Meta(description="seconds of audio")]
    sample_rate: Annotated[int, Meta(description="Hz")]
    channels: int
    size: Annotated[int, Meta(description="bytes of the file that was uploaded")]
    upload_format: AudioFormat
    audio_url: str
    peaks_url: str
    title: str | None = None
    error: Annotated[str, Meta(description="why it failed")] | None = None
    children: Annotated[
        list[str], Meta(description="ids of songs that go on from it, the newest last, at most 100")
    ] = []


class RecordingsBody(msgspec.Struct, frozen=True, kw_only=True):
    """A page of recordings, newest first."""

    recordings: list[RecordingBody]
    next: str | None  # the cursor of the page that follows; None on the last


def place_of_recording(job_id: str) -> str:
    """The address of a recording."""
    return f"/recordings/{job_id}"


class Recordings:
    """Reads recordings for their tenants, from records. Methods raise `Unavailable` without NATS."""

    def __init__(self, jobs: JobStore, song_index: SongIndex) -> None:
        self._jobs, self._index = jobs, song_index

    async def find(self, tenant: str, recording_id: str) -> Job:
        """The record of a tenant's recording. Raises a 404 `ApiError`."""
        # What has not the form of an id must not become part of a subject.
        job = await self._jobs.get(recording_id, tenant) if JOB_ID.fullmatch(recording_id) else None
        if job is None or job.recording is None:
            raise unknown_recording()
        return job

    async def page(
        self, tenant: str, limit: int, after: Place | None, status: RecordingStatus | None
    ) -> RecordingsBody:
        """A page of a tenant's recordings older than `after`; shorter than `limit` where records expired meanwhile."""
        wanted = None if status is None else RECORD_STATUS[status]
        ids, rest = await self._index.page(tenant, limit, after, wanted, recordings=True)
        jobs = await read_records(self._jobs, self._index, tenant, ids)
        shown = [job for job in jobs if wanted in (None, job.status)]
        return RecordingsBody(
            recordings=[self.describe_stored(job) for job in shown], next=None if rest is None else cursor_of(rest)
        )

    async def describe(self, job: Job) -> RecordingBody:
        """The state of a recording, with the songs that go on from it."""
        await self._index.catch_up()
        return self.describe_stored(job)

    def describe_stored(self, job: Job) -> RecordingBody:
        """The state of a recording that was just stored. Raises nothing: it was accepted, whatever fails now."""
        recording, place = job.recording, place_of_recording(job.job_id)
        assert recording is not None
        status = _SHOWN.get(job.status, "failed")  # a cancelled one is about to be removed
        return RecordingBody(
            recording_id=job.job_id,
            status=status,
            progress=_progress(job),
            created_at=timestamp(job.created_at),
            completed_at=None if job.completed_at is None else timestamp(job.completed_at),
            duration=job.duration_s or 0.0,
            sample_rate=job.sample_rate or 0,
            channels=recording.channels,
            size=recording.upload_bytes,
            upload_format=recording.upload_format,
            audio_url=f"{place}/audio",
            peaks_url=f"{place}/peaks",
            title=job.request.title,
            error=_error(job),
            children=self._index.children_of(job.job_id, job.tenant)[-_MOST_CHILDREN:],
        )


def _progress(job: Job) -> float:
    """The share of a recording that is encoded, in per cent."""
    if job.status == "completed":
        return 100.0
    frames = frames_within(round((job.duration_s or 0) * 1000))
    return min(100.0, 100 * (job.saved_frames or 0) / max(1, frames))


def _error(job: Job) -> str | None:
    if job.status == "cancelled":
        return "it was to be deleted, and was not deleted to the end; delete it again, or upload it again"
    return job.error if job.status == "failed" else None  # before, it is that of an attempt
