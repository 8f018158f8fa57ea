"""The frames with which a song begins that goes on from another one."""

import logging

import numpy as np

from shared.errors import NewerRecord, ObjectError, SongError
from shared.jobs.continuing import KeptTokens, kept_tokens
from shared.jobs.store import JobStore
from shared.model.codec_windows import CodecWindows
from shared.schema.job import Job, Parent
from shared.storage.keys import kept_tokens_key
from shared.storage.objects import ObjectStore
from shared.storage.token_file import EarlierWindow, TokenMeta, pack, unpack

log = logging.getLogger(__name__)


async def load_kept(
    job: Job, parent: Parent, jobs: JobStore, store: ObjectStore, windows: CodecWindows | None
) -> tuple[np.ndarray, tuple[EarlierWindow, ...]]:
    """Load what a song keeps of its `parent`: int16 ``[8, parent.frames]``, and the codec's windows beside it.

    The song's own copy was stored before the song was queued. Where it is damaged or gone, the tokens are copied from
    the parent again. Raises `SongError` where those are gone as well, and `Unavailable`.
    """
    key = kept_tokens_key(job.job_id)
    try:
        codes, meta = unpack(await store.get(key), job.job_id)
        if codes.shape[1] == parent.frames:
            return codes, meta.earlier
        reason = f"{codes.shape[1]} frames are stored instead of {parent.frames}"
    except ObjectError as error:
        reason = str(error)
    log.warning("%s: the frames that it keeps are copied again, %s", job.job_id, reason)
    kept, meta = await _copied(job, parent, jobs, store, windows)
    await store.put(key, pack(kept.codes, meta))
    return kept.codes, kept.earlier


async def _copied(
    job: Job, parent: Parent, jobs: JobStore, store: ObjectStore, windows: CodecWindows | None
) -> tuple[KeptTokens, TokenMeta]:
    """Copy the parent's tokens as at the song's submission. Raises `SongError` and `Unavailable`."""
    lost = f"the {parent.frames} frames that it keeps are lost, and cannot be copied again"
    source = f"the {'recording' if parent.recording_id else 'song'} that it goes on from, {parent.id},"
    try:
        origin = await jobs.get(parent.id, job.tenant)
    except NewerRecord as error:
        raise SongError(f"{lost}: {source} cannot be read, {error}") from None
    if origin is None:
        raise SongError(f"{lost}: {source} was deleted or has expired")
    if origin.tokens_key is None:
        raise SongError(f"{lost}: {source} has no tokens any more")
    try:
        codes, meta = unpack(await store.get(origin.tokens_key), origin.job_id)
    except ObjectError as error:
        raise SongError(f"{lost}: {source} has no tokens any more, {error}") from None
    if codes.shape[1] < parent.frames:
        raise SongError(f"{lost}: {source} has {codes.shape[1]} frames")
    kept = kept_tokens(origin, codes, meta.earlier, parent.frames, windows)
    return kept, TokenMeta(job_id=job.job_id, model=meta.model, seed=meta.seed, ended=False, earlier=kept.earlier)
