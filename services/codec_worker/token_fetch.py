"""Search for the tokens of a song that is to be decoded."""

import numpy as np

from shared.errors import ObjectError, TokensLost
from shared.jobs.store import JobStore
from shared.schema.job import DecodeJob, Job
from shared.storage.objects import ObjectStore
from shared.storage.token_file import unpack


async def fetch_tokens(job: Job, order: DecodeJob, store: ObjectStore, jobs: JobStore) -> np.ndarray:
    """Fetch all tokens of a song, int16 ``[8, T]``, by its record as it was claimed and its message.

    The message may be of a tokenizer that had lost its lease, and its tokens deleted since. The record may have been
    claimed before it was moved on, and name the first frames only. So the first tokens that are whole are taken; when
    none are, a tokenizer may have moved the record on after the claim. Raises `TokensLost` or `Unavailable`.
    """
    try:
        return await _first_whole(job, order, store)
    except TokensLost:
        now = await jobs.get(job.job_id, job.tenant)
        if now is None or (now.tokens_key == job.tokens_key and now.frames == job.frames):
            raise
        return await _first_whole(now, order, store)


async def _first_whole(job: Job, order: DecodeJob, store: ObjectStore) -> np.ndarray:
    wrong = []
    for key in token_keys(job, order):
        try:
            codes, meta = unpack(await store.get(key), job.job_id)
        except ObjectError as error:
            wrong.append(str(error))
            continue
        if meta.ended:
            return codes
        wrong.append(f"the token file holds the first {codes.shape[1]} frames only")
    raise TokensLost("; ".join(wrong))


def token_keys(job: Job, order: DecodeJob) -> list[str]:
    """Object keys at which a song's tokens may be, that of the record first."""
    return list(dict.fromkeys(key for key in (job.tokens_key, order.tokens_key) if key is not None))
