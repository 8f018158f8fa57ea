"""Search for the tokens of a song that is to be decoded."""

from dataclasses import dataclass

import numpy as np

from shared.errors import ObjectError, TokensLost
from shared.jobs.store import JobStore
from shared.schema.job import DecodeJob, Job
from shared.storage.objects import ObjectStore
from shared.storage.token_file import TokenMeta, unpack


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of a song."""

    key: str  # of their object
    codes: np.ndarray  # int16 [8, T], from the song's first on
    meta: TokenMeta

    @property
    def ended(self) -> bool:
        """Whether they are the whole song."""
        return self.meta.ended


async def fetch_tokens(job: Job, order: DecodeJob, store: ObjectStore, jobs: JobStore, *, whole: bool = True) -> Tokens:
    """Fetch the tokens of a song by its record as it was claimed and its message: all of them, unless not `whole`.

    The message may be of a tokenizer that had lost its lease, and its tokens deleted since. The record may have been
    claimed before it was moved on, and name the first frames only. So the first tokens that are whole are taken, before
    others; when none are, a tokenizer may have changed the record after the claim. Raises `TokensLost` or
    `Unavailable`.
    """
    try:
        return await _first_usable(job, order, store, whole)
    except TokensLost:
        now = await jobs.get(job.job_id, job.tenant)
        if now is None or (now.tokens_key == job.tokens_key and now.frames == job.frames):
            raise
        return await _first_usable(now, order, store, whole)


async def _first_usable(job: Job, order: DecodeJob, store: ObjectStore, whole: bool) -> Tokens:
    wrong, begun = [], None
    for key in token_keys(job, order):
        try:
            codes, meta = unpack(await store.get(key), job.job_id)
        except ObjectError as error:
            wrong.append(str(error))
            continue
        if meta.ended:
            return Tokens(key, codes, meta)
        begun = begun or Tokens(key, codes, meta)
        wrong.append(f"the token file holds the first {codes.shape[1]} frames only")
    if begun is not None and not whole:
        return begun
    raise TokensLost("; ".join(wrong))


def token_keys(job: Job, order: DecodeJob) -> list[str]:
    """Object keys at which a song's tokens may be, that of the record first."""
    return list(dict.fromkeys(key for key in (job.tokens_key, order.tokens_key) if key is not None))
