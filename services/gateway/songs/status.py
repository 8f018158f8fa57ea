"""The state of songs as users see it: one song, or a page of them."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta
from nats.js import JetStreamContext

from services.gateway.errors import unknown_job
from services.gateway.events.broadcaster import Broadcaster
from services.gateway.events.stored_events import newest
from services.gateway.songs.eta import EtaEstimator
from services.gateway.songs.index import Place, SongIndex, cursor_of
from shared.errors import HeartMulaError, NewerRecord
from shared.frames import milliseconds_of
from shared.jobs.events import progress_at_start
from shared.jobs.store import JobStore
from shared.nats.subjects import event_subject
from shared.schema.base import JOB_ID, timestamp
from shared.schema.event import Progress, Stage
from shared.schema.job import Job, Parent, Status
from shared.schema.request import AudioFormat, ContinueFrom, Priority

_MOST_CHILDREN = 100  # that are named; others can be listed


class StatusBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer of ``/generate/{job_id}/status``."""

    job_id: str
    status: Status
    progress: float  # 0–100, never goes back
    created_at: str  # RFC 3339, as all times here
    completed_at: str | None  # when it ended, however it ended
    playable_seconds: Annotated[float, Meta(description="seconds from the song's beginning that can be heard")]
    not_before: Annotated[str, Meta(description="when it is queued, or was")] | None = None
    stage: str | None = None  # what is being done, while it runs
    queue_position: int | None = None  # songs before it, while it waits
    eta: str | None = None  # when it is expected to be completed
    error: str | None = None
    seed: int | None = None
    duration: float | None = None  # seconds of audio
    sample_rate: int | None = None  # Hz
    title: str | None = None
    format: AudioFormat | None = None


class RequestBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was asked for, with what the gateway filled in: submitted again, it makes the same song."""

    lyrics: str
    tags: str
    max_duration_ms: int | None
    temperature: float
    cfg_scale: float
    topk: int
    seed: int | None
    format: AudioFormat
    title: str | None
    priority: Priority
    continue_from: ContinueFrom | None = None
    min_new_ms: int | None = None  # with continue_from
    instrumental: bool = False

    @classmethod
    def of(cls, job: Job) -> "RequestBody":
        """The request of a song, from its record."""
        elsewhere = ("continue_from", "min_new_ms", "instrumental")
        fields = {name: getattr(job.request, name) for name in cls.__struct_fields__ if name not in elsewhere}
        body, parent = cls(**fields, instrumental=job.instrumental), job.parent
        if parent is None:
            return body
        return msgspec.structs.replace(
            body,
            continue_from=ContinueFrom(
                job_id=parent.job_id, recording_id=parent.recording_id, at_ms=milliseconds_of(parent.frames)
            ),
            min_new_ms=milliseconds_of(parent.least_frames - parent.frames),
        )


class ParentBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The song or recording that a song goes on from."""

    job_id: str | None = None
    recording_id: str | None = None
    at_ms: Annotated[int, Meta(description="so much of it is kept")]
    exists: Annotated[bool, Meta(description="false where it was deleted or has expired")]


class Song(StatusBody, frozen=True, kw_only=True, omit_defaults=True):
    """A song with what was asked for."""

    request: RequestBody
    group: Annotated[str, Meta(description="id of the first of its variants, where there are several")] | None = None
    variant: Annotated[int, Meta(description="which of them it is, from 1")] | None = None
    parent: ParentBody | None = None
    children: Annotated[
        list[str], Meta(description="ids of songs that go on from it, the newest last, at most 100")
    ] = []


class SongsBody(msgspec.Struct, frozen=True, kw_only=True):
    """A page of songs, newest first."""

    songs: list[Song]
    next: str | None  # the cursor of the page that follows; None on the last


class Songs:
    """Reads songs for their tenants, from records and events. Methods raise `Unavailable` without NATS."""

    def __init__(
        self,
        js: JetStreamContext,
        jobs: JobStore,
        song_index: SongIndex,
        broadcaster: Broadcaster,
        eta: EtaEstimator,
    ) -> None:
        self._js, self._jobs, self._index = js, jobs, song_index
        self._broadcaster, self._eta = broadcaster, eta

    async def find(self, tenant: str, job_id: str) -> Job:
        """The record of a tenant's song. Raises a 404 `ApiError`."""
        # What has not the form of an id must not become part of a subject.
        job = await self._jobs.get(job_id, tenant) if JOB_ID.fullmatch(job_id) else None
        if job is None or job.recording is not None:
            raise unknown_job()
        return job

    async def page(
        self, tenant: str, limit: int, after: Place | None, status: Status | None, parent: str | None = None
    ) -> SongsBody:
        """A page of a tenant's songs older than `after`; shorter than `limit` where records expired meanwhile."""
        ids, rest = await self._index.page(tenant, limit, after, status, parent)
        shown = [job for job in await self.read(tenant, ids) if status in (None, job.status)]
        bodies = await asyncio.gather(*(self._describe_with_request(job) for job in shown))
        return SongsBody(songs=bodies, next=None if rest is None else cursor_of(rest))

    async def read(self, tenant: str, ids: Sequence[str]) -> list[Job]:
        """The records of a tenant's songs that the index knows, without those that are gone or a newer version's."""
        return [job for job in await read_records(self._jobs, self._index, tenant, ids) if job.recording is None]

    async def describe(self, job: Job) -> StatusBody:
        """The state of a song. Its progress and stage come from its events, the rest from its record."""
        running = job.status in ("generating", "decoding")
        latest, stage = await asyncio.gather(self._latest(job), self._stage(job) if running else _nothing())
        expected = await self._eta.estimate(job, latest)
        return StatusBody(
            job_id=job.job_id,
            status=job.status,
            progress=self._progress(job, latest),
            created_at=timestamp(job.created_at),
            completed_at=None if job.completed_at is None else timestamp(job.completed_at),
            playable_seconds=job.playable_seconds,
            not_before=None if job.not_before is None else timestamp(job.not_before),
            stage=stage,
            queue_position=expected.position,
            eta=expected.eta,
            error=job.error if job.status == "failed" else None,  # before, it is that of an attempt
            seed=job.request.seed,
            duration=job.duration_s,
            sample_rate=job.sample_rate,
            title=job.request.title,
            format=job.request.format,
        )

    async def describe_with_request(self, job: Job) -> Song:
        """The state of a song with what was asked for, and with the songs that it belongs with."""
        await self._index.catch_up()
        return await self._describe_with_request(job)

    async def _describe_with_request(self, job: Job) -> Song:
        return Song(
            **msgspec.structs.asdict(await self.describe(job)),
            request=RequestBody.of(job),
            group=job.group,
            variant=job.variant,
            parent=None if job.parent is None else self._describe_parent(job.tenant, job.parent),
            children=self._index.children_of(job.job_id, job.tenant)[-_MOST_CHILDREN:],
        )

    def _describe_parent(self, tenant: str, parent: Parent) -> ParentBody:
        return ParentBody(
            job_id=parent.job_id,
            recording_id=parent.recording_id,
            at_ms=milliseconds_of(parent.frames),
            exists=self._index.exists(parent.id, tenant),
        )

    async def last_progress(self, job: Job) -> float:
        """How far a song has come, in per cent; 0 while NATS does not answer."""
        try:
            return self._progress(job, await self._latest(job))
        except HeartMulaError:
            return 0.0

    async def _latest(self, job: Job) -> Progress | None:
        if job.status == "completed" or (job.status == "queued" and not job.started_at):  # there are no such events
            return None
        stored = await newest(self._js, event_subject(job.tenant, job.job_id, "progress"))
        return stored.event.data if stored and isinstance(stored.event.data, Progress) else None

    def _progress(self, job: Job, latest: Progress | None) -> float:
        if job.status == "completed":
            return 100.0
        reported = latest.progress if latest else 0.0
        # A song that is started again after the death of a worker has newer events with less progress.
        return max(reported, self._broadcaster.furthest_progress(job.job_id), progress_at_start(job.status))

    async def _stage(self, job: Job) -> str | None:
        stored = await newest(self._js, event_subject(job.tenant, job.job_id, "stage"))
        return stored.event.data.stage if stored and isinstance(stored.event.data, Stage) else None


async def read_records(jobs: JobStore, song_index: SongIndex, tenant: str, ids: Sequence[str]) -> list[Job]:
    """The records that the index knows, without those that are gone, which it forgets, or a newer version's."""

    async def readable(job_id: str) -> Job | None:
        try:
            return await jobs.get(job_id, tenant)
        except NewerRecord:
            return None

    found = await asyncio.gather(*(readable(job_id) for job_id in ids))
    for job_id, job in zip(ids, found, strict=True):
        if job is None:
            song_index.forget(job_id)
    return [job for job in found if job is not None]


async def _nothing() -> None:
    return None
