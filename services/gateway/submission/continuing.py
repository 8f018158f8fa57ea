"""Songs that go on from another one: that song, what is taken over from it, and the object that this is stored in."""

from dataclasses import dataclass

from services.gateway.errors import ApiError
from shared.errors import NewerRecord, ObjectError
from shared.frames import frames_covering, frames_within
from shared.jobs.continuing import KeptTokens, kept_tokens
from shared.jobs.store import JobStore
from shared.model.codec_windows import CodecWindows
from shared.schema.base import JOB_ID
from shared.schema.job import Job, Parent
from shared.schema.request import ContinueFrom, GenerateRequest
from shared.storage.keys import kept_tokens_key
from shared.storage.objects import ObjectStore
from shared.storage.token_file import TokenMeta, pack, unpack


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A completed song that another one may go on from."""

    job: Job
    tokens_key: str
    all_frames: int  # of the song
    frames: int  # of those, that are to be kept


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a song takes over from another one."""

    origin: Origin
    kept: KeptTokens
    model: str  # that made them
    seed: int  # with which they were made

    @property
    def frames(self) -> int:
        """Frames that are kept, 80 ms each."""
        return int(self.kept.codes.shape[1])

    def parent(self, request: GenerateRequest, min_new_ms: int) -> Parent:
        """What the record of a song says of it, given its request with every field filled in."""
        most = frames_within(request.max_duration_ms or 0)
        return Parent(
            job_id=self.origin.job.job_id,
            frames=self.frames,
            least_frames=min(most, self.frames + frames_covering(min_new_ms)),
            seeds=self.kept.seeds,
        )


class Continuations:
    """Reads what songs go on from, and stores what they take over. Methods raise `Unavailable`."""

    def __init__(self, jobs: JobStore, store: ObjectStore, windows: CodecWindows | None) -> None:
        """`windows` are the codec's; None where it decodes songs as wholes."""
        self._jobs, self._store, self._windows = jobs, store, windows

    async def find(self, tenant: str, asked: ContinueFrom) -> Origin:
        """The song that a tenant wants to go on from. Raises a 404, 409 or 410 `ApiError` where that cannot be."""
        origin = await self._find(tenant, asked)
        try:
            await self._store.stat(origin.tokens_key)
        except ObjectError:
            raise _no_tokens(origin.job.job_id) from None
        return origin

    async def open(self, tenant: str, asked: ContinueFrom) -> Continuation:
        """What a tenant's song takes over that goes on from another one. Raises as `find`."""
        origin = await self._find(tenant, asked)
        try:
            codes, meta = unpack(await self._store.get(origin.tokens_key), origin.job.job_id)
        except ObjectError:  # they have expired, or are damaged
            raise _no_tokens(origin.job.job_id) from None
        kept = kept_tokens(origin.job, codes, meta.earlier, origin.frames, self._windows)
        return Continuation(origin=origin, kept=kept, model=meta.model, seed=meta.seed)

    async def store(self, job_id: str, found: Continuation) -> None:
        """Store what a song takes over, to be there before its record is."""
        meta = TokenMeta(job_id=job_id, model=found.model, seed=found.seed, ended=False, earlier=found.kept.earlier)
        await self._store.put(kept_tokens_key(job_id), pack(found.kept.codes, meta))

    async def _find(self, tenant: str, asked: ContinueFrom) -> Origin:
        """What records say of the song. Its tokens may be gone all the same: they expire on their own."""
        if asked.job_id is None:
            return await self._find_recording(tenant, asked.recording_id or "")
        job = await self._read_record(tenant, asked.job_id)
        if job.status != "completed":
            raise ApiError(
                409,
                "conflict",
                f"the song {job.job_id} is {job.status}; only a completed song can be gone on from",
                field="continue_from.job_id",
            )
        if job.tokens_key is None or not job.frames:
            raise _no_tokens(job.job_id)
        wanted = job.frames if asked.at_ms is None else frames_within(asked.at_ms)
        return Origin(job=job, tokens_key=job.tokens_key, all_frames=job.frames, frames=min(wanted, job.frames))

    async def _find_recording(self, tenant: str, recording_id: str) -> Origin:
        """The recording that a tenant wants to go on from. There are none yet."""
        raise ApiError(404, "unknown-recording", "no recording has this id", field="continue_from.recording_id")

    async def _read_record(self, tenant: str, job_id: str) -> Job:
        field = "continue_from.job_id"
        try:
            # What has not the form of an id must not become part of a subject.
            job = await self._jobs.get(job_id, tenant) if JOB_ID.fullmatch(job_id) else None
        except NewerRecord as error:
            raise ApiError(409, "conflict", str(error), field=field) from None
        if job is None:
            raise ApiError(404, "unknown-job", "no song has this id; records are kept for a week", field=field)
        return job


def _no_tokens(job_id: str) -> ApiError:
    return ApiError(
        410,
        "no-tokens",
        f"the tokens of the song {job_id} are no longer kept, so no other song can go on from it; take another one",
        field="continue_from.job_id",
    )
