"""Songs that go on from a song or a recording: that one, what is taken over from it, and the object that holds this."""

from dataclasses import dataclass

from services.gateway.errors import ApiError
from shared.errors import NewerRecord, ObjectError
from shared.frames import frames_covering, frames_within, milliseconds_of
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
    """A completed song, or a recording that is ready, that a song may go on from."""

    job: Job
    tokens_key: str
    all_frames: int  # of the song or recording
    frames: int  # of those, that are to be kept


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a song takes over from another one, or from a recording."""

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
        most, origin = frames_within(request.max_duration_ms or 0), self.origin.job
        return Parent(
            job_id=None if origin.recording else origin.job_id,
            recording_id=origin.job_id if origin.recording else None,
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
        """What a tenant wants to go on from. Raises a 404, 409, 410 or 422 `ApiError` where that cannot be."""
        origin = await self._find(tenant, asked)
        try:
            await self._store.stat(origin.tokens_key)
        except ObjectError:
            raise _no_tokens(origin.job) from None
        return origin

    async def open(self, tenant: str, asked: ContinueFrom) -> Continuation:
        """What a tenant's song takes over that goes on from another one. Raises as `find`."""
        origin = await self._find(tenant, asked)
        try:
            codes, meta = unpack(await self._store.get(origin.tokens_key), origin.job.job_id)
        except ObjectError:  # they have expired, or are damaged
            raise _no_tokens(origin.job) from None
        kept = kept_tokens(origin.job, codes, meta.earlier, origin.frames, self._windows)
        return Continuation(origin=origin, kept=kept, model=meta.model, seed=meta.seed)

    async def store(self, job_id: str, found: Continuation) -> None:
        """Store what a song takes over, to be there before its record is."""
        meta = TokenMeta(job_id=job_id, model=found.model, seed=found.seed, ended=False, earlier=found.kept.earlier)
        await self._store.put(kept_tokens_key(job_id), pack(found.kept.codes, meta))

    async def _find(self, tenant: str, asked: ContinueFrom) -> Origin:
        """What records say of it. Its tokens may be gone all the same: they expire on their own."""
        if asked.job_id is not None:
            job = await self._find_song(tenant, asked.job_id)
        else:
            job = await self._find_recording(tenant, asked.recording_id or "")
        if job.tokens_key is None or not job.frames:
            raise _no_tokens(job)
        frames = job.frames
        if asked.at_ms is not None:
            frames = frames_within(asked.at_ms)
            if frames > job.frames and asked.at_ms > 1000 * (job.duration_s or 0):  # audio may end within a frame
                raise _too_late(job, job.frames)
        return Origin(job=job, tokens_key=job.tokens_key, all_frames=job.frames, frames=min(frames, job.frames))

    async def _find_song(self, tenant: str, job_id: str) -> Job:
        field, job = "continue_from.job_id", await self._read_record(tenant, job_id, "continue_from.job_id")
        if job is None:
            raise ApiError(404, "unknown-job", "no song has this id; records are kept for a week", field=field)
        if job.recording is not None:
            words = "this is the id of a recording: give it as recording_id"
            raise ApiError(404, "unknown-job", words, field=field)
        if job.status != "completed":
            words = f"the song {job_id} is {job.status}; only a completed song can be gone on from"
            raise ApiError(409, "conflict", words, field=field)
        return job

    async def _find_recording(self, tenant: str, recording_id: str) -> Job:
        field = "continue_from.recording_id"
        job = await self._read_record(tenant, recording_id, field)
        if job is None:
            words = "no recording has this id; recordings are kept for a week"
            raise ApiError(404, "unknown-recording", words, field=field)
        if job.recording is None:
            words = "this is the id of a song: give it as job_id"
            raise ApiError(404, "unknown-recording", words, field=field)
        if job.status in ("queued", "generating"):
            words = "the recording is still being encoded; try again when it is ready"
            raise ApiError(409, "not-ready", words, field=field)
        if job.status != "completed":
            why = f": {job.error}" if job.error else ""
            words = f"the recording {recording_id} could not be encoded{why}; upload it again"
            raise ApiError(409, "conflict", words, field=field)
        return job

    async def _read_record(self, tenant: str, job_id: str, field: str) -> Job | None:
        try:
            # What has not the form of an id must not become part of a subject.
            return await self._jobs.get(job_id, tenant) if JOB_ID.fullmatch(job_id) else None
        except NewerRecord as error:
            raise ApiError(409, "conflict", str(error), field=field) from None


def _field(job: Job) -> str:
    return "continue_from.job_id" if job.recording is None else "continue_from.recording_id"


def _name(job: Job) -> str:
    return f"the {'song' if job.recording is None else 'recording'} {job.job_id}"


def _no_tokens(job: Job) -> ApiError:
    again = "take another one" if job.recording is None else "delete it and upload it again"
    words = f"the tokens of {_name(job)} are no longer kept, so no song can go on from it; {again}"
    return ApiError(410, "no-tokens", words, field=_field(job))


def _too_late(job: Job, frames: int) -> ApiError:
    words = f"{_name(job)} is {milliseconds_of(frames)} ms long: keep at most that, or leave at_ms out to keep all"
    return ApiError(422, "invalid-request", words, field="continue_from.at_ms")
