"""One song as users see it, and pages of songs."""

import asyncio
import re
from typing import Annotated, cast, get_args

import msgspec
from msgspec import Meta

from services.gateway.container import Gateway
from services.gateway.errors import ApiError, unknown_job
from services.gateway.events.store import newest
from services.gateway.songs.index import cursor_of, place_of
from shared.errors import HeartMulaError, NewerRecord
from shared.jobs.events import progress_at_start
from shared.nats.subjects import event_subject
from shared.schema.base import JOB_ID, timestamp
from shared.schema.event import Progress, Stage
from shared.schema.job import Job, Status
from shared.schema.request import AudioFormat, Priority

MAX_PAGE = 100  # songs


class StatusBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer of ``/generate/{job_id}/status``."""

    job_id: str
    status: Status
    progress: float  # 0–100, never goes back
    created_at: str  # RFC 3339, as all times here
    completed_at: str | None  # when it ended, however it ended
    stage: str | None = None  # what is being done, while it runs
    queue_position: int | None = None  # songs before it, while it waits
    eta: str | None = None  # when it is expected to be completed
    error: str | None = None
    seed: int | None = None
    duration: float | None = None  # seconds of audio
    sample_rate: int | None = None  # Hz
    title: str | None = None
    format: AudioFormat | None = None


class RequestBody(msgspec.Struct, frozen=True, kw_only=True):
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


class Song(StatusBody, frozen=True, kw_only=True, omit_defaults=True):
    """A song with what was asked for."""

    request: RequestBody
    group: Annotated[str, Meta(description="id of the first of its variants, where there are several")] | None = None
    variant: Annotated[int, Meta(description="which of them it is, from 1")] | None = None


class SongsBody(msgspec.Struct, frozen=True, kw_only=True):
    """A page of songs, newest first."""

    songs: list[Song]
    next: str | None  # the cursor of the page that follows; None on the last


async def find_job(gateway: Gateway, tenant: str, job_id: str) -> Job:
    """The record of a tenant's song. Raises a 404 `ApiError`; an id that is none must not get into a subject."""
    job = await gateway.jobs.get(job_id, tenant) if JOB_ID.fullmatch(job_id) else None
    if job is None:
        raise unknown_job()
    return job


async def listing(gateway: Gateway, tenant: str, limit: str, cursor: str | None, status: str | None) -> SongsBody:
    """A page of a tenant's songs; shorter than `limit` where records expired meanwhile. Raises a 422 `ApiError`."""
    if not re.fullmatch(r"[0-9]{1,3}", limit, re.ASCII) or not 1 <= int(limit) <= MAX_PAGE:
        raise ApiError(422, "invalid-request", f"limit has to be from 1 to {MAX_PAGE}", field="limit")
    if status is not None and status not in get_args(Status):
        known = ", ".join(get_args(Status))
        raise ApiError(422, "invalid-request", f"status has to be one of {known}", field="status")
    after = None if cursor is None else place_of(cursor)
    ids, rest = await gateway.song_index.page(tenant, int(limit), after, cast("Status | None", status))
    jobs = await asyncio.gather(*(_readable(gateway, tenant, job_id) for job_id in ids))
    for job_id, job in zip(ids, jobs, strict=True):
        if job is None:
            gateway.song_index.forget(job_id)
    shown = [job for job in jobs if job is not None and status in (None, job.status)]
    bodies = await asyncio.gather(*(describe_whole(gateway, job) for job in shown))
    return SongsBody(songs=bodies, next=None if rest is None else cursor_of(rest))


async def _readable(gateway: Gateway, tenant: str, job_id: str) -> Job | None:
    try:
        return await gateway.jobs.get(job_id, tenant)
    except NewerRecord:
        return None


async def describe(gateway: Gateway, job: Job) -> StatusBody:
    """The state of a song. How far it is comes from its events, the rest from its record."""
    running = job.status in ("generating", "decoding")
    latest, stage = await asyncio.gather(_latest(gateway, job), _stage(gateway, job) if running else _nothing())
    expected = await gateway.eta.estimate(job, latest)
    return StatusBody(
        job_id=job.job_id,
        status=job.status,
        progress=_progress(gateway, job, latest),
        created_at=timestamp(job.created_at),
        completed_at=None if job.completed_at is None else timestamp(job.completed_at),
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


async def describe_whole(gateway: Gateway, job: Job) -> Song:
    """The state of a song with what was asked for."""
    state = msgspec.structs.asdict(await describe(gateway, job))
    asked = {name: getattr(job.request, name) for name in RequestBody.__struct_fields__}
    return Song(**state, request=RequestBody(**asked), group=job.group, variant=job.variant)


async def _latest(gateway: Gateway, job: Job) -> Progress | None:
    if job.status == "completed" or (job.status == "queued" and not job.started_at):  # nothing to look for
        return None
    stored = await newest(gateway.js, event_subject(job.tenant, job.job_id, "progress"))
    return stored.event.data if stored and isinstance(stored.event.data, Progress) else None


def _progress(gateway: Gateway, job: Job, latest: Progress | None) -> float:
    if job.status == "completed":
        return 100.0
    told = latest.progress if latest else 0.0
    # A song that is begun again after a worker's death has newer events with less progress.
    return max(told, gateway.broadcaster.furthest_progress(job.job_id), progress_at_start(job.status))


async def _stage(gateway: Gateway, job: Job) -> str | None:
    stored = await newest(gateway.js, event_subject(job.tenant, job.job_id, "stage"))
    return stored.event.data.stage if stored and isinstance(stored.event.data, Stage) else None


async def _nothing() -> None:
    return None


async def last_progress(gateway: Gateway, job: Job) -> float:
    try:
        return _progress(gateway, job, await _latest(gateway, job))
    except HeartMulaError:
        return 0.0
