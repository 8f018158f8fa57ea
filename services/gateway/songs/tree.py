"""Songs that go on from one another, as a tree."""

from collections import deque

import msgspec

from services.gateway.songs.index import SongIndex
from services.gateway.songs.status import Songs
from shared.errors import NewerRecord
from shared.frames import milliseconds_of
from shared.jobs.store import JobStore
from shared.schema.base import timestamp
from shared.schema.job import Job, Status

MOST = 1_000  # songs of a tree that are shown
_READ_AT_ONCE = 50  # records


class TreeSong(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A song in a tree."""

    job_id: str
    status: Status
    created_at: str  # RFC 3339
    parent: str | None = None  # id of the song or recording that it goes on from, which may be gone
    at_ms: int | None = None  # so much of that one is kept
    title: str | None = None
    duration: float | None = None  # seconds of audio


class TreeRecording(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The recording that the songs of a tree go back to."""

    recording_id: str
    created_at: str  # RFC 3339
    title: str | None = None
    duration: float | None = None  # seconds of audio


class TreeBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All songs that go back to the same one."""

    root: str  # id of what all of them go back to: a song, one that is gone, or a recording
    recording: TreeRecording | None = None  # where the root is one, and is not gone
    songs: list[TreeSong]  # parents before children
    left_out: int = 0  # further songs of a large tree


class Trees:
    """Finds the trees of songs. Raises `Unavailable` without NATS."""

    def __init__(self, songs: Songs, song_index: SongIndex, jobs: JobStore) -> None:
        self._songs, self._index, self._jobs = songs, song_index, jobs

    async def find(self, tenant: str, job_id: str) -> TreeBody:
        """The tree that a tenant's song belongs to. Raises a 404 `ApiError`."""
        await self._songs.find(tenant, job_id)
        await self._index.catch_up()
        path = self._path(tenant, job_id)
        ids = [found for found in self._all_from(tenant, path[0]) if self._index.exists(found, tenant)]
        if len(ids) > MOST:  # the song itself is shown in any case
            ids = list(dict.fromkeys([found for found in path if self._index.exists(found, tenant)] + ids))
        jobs: list[Job] = []
        for start in range(0, min(len(ids), MOST), _READ_AT_ONCE):
            jobs += await self._songs.read(tenant, ids[start : min(start + _READ_AT_ONCE, MOST)])
        return TreeBody(
            root=path[0],
            recording=await self._recording(tenant, path[0]),
            songs=[_shown(job) for job in jobs],
            left_out=max(0, len(ids) - MOST),
        )

    async def _recording(self, tenant: str, root: str) -> TreeRecording | None:
        """The recording with this id, if it is one."""
        try:
            job = await self._jobs.get(root, tenant) if self._index.is_recording(root, tenant) else None
        except NewerRecord:
            return None
        if job is None:
            return None
        return TreeRecording(
            recording_id=job.job_id,
            created_at=timestamp(job.created_at),
            title=job.request.title,
            duration=job.duration_s,
        )

    def _path(self, tenant: str, job_id: str) -> list[str]:
        """The ids from the root of a song's tree down to the song; the root may be gone."""
        path = [job_id]
        while (parent := self._index.parent_of(path[-1], tenant)) is not None and parent not in path:
            path.append(parent)
        return path[::-1]

    def _all_from(self, tenant: str, root: str) -> list[str]:
        """The ids of a root and of all below it, parents before children."""
        found, waiting = {root: None}, deque([root])
        while waiting:
            for child in self._index.children_of(waiting.popleft(), tenant):
                if child not in found:  # no record is trusted: they may form a ring
                    found[child] = None
                    waiting.append(child)
        return list(found)


def _shown(job: Job) -> TreeSong:
    parent = job.parent
    return TreeSong(
        job_id=job.job_id,
        status=job.status,
        created_at=timestamp(job.created_at),
        parent=None if parent is None else parent.id,
        at_ms=None if parent is None else milliseconds_of(parent.frames),
        title=job.request.title,
        duration=job.duration_s,
    )
