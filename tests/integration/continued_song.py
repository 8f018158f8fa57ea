"""Songs that go on from another one, put into the queue as the gateway does it."""

import time
import uuid

import msgspec
import numpy as np

from shared.jobs.continuing import kept_tokens
from shared.jobs.queues import queue_tokens
from shared.model.codec_windows import windows_of
from shared.nats.subjects import TENANT
from shared.schema.base import CONTINUED_SCHEMA
from shared.schema.job import Job, Parent
from shared.schema.request import GenerateRequest
from shared.storage.keys import kept_tokens_key, tokens_key
from shared.storage.token_file import TokenMeta, pack, unpack
from tests.integration.flow import Flow

PARENT_SEED = 77


async def put_parent(flow: Flow, codes: np.ndarray) -> Job:
    """Store a completed song with int16 `codes` ``[8, T]``."""
    job = Job(
        job_id=str(uuid.uuid4()),
        tenant=TENANT,
        request=GenerateRequest(lyrics="la", max_duration_ms=codes.shape[1] * 80, seed=PARENT_SEED),
        created_at=time.time(),
        status="completed",
        frames=codes.shape[1],
    )
    key = tokens_key(job.job_id, 1)
    await flow.store.put(key, pack(codes, TokenMeta(job_id=job.job_id, model="other", seed=PARENT_SEED)))
    job = msgspec.structs.replace(job, tokens_key=key)
    await flow.jobs.create(job)
    return job


async def tokens_of(flow: Flow, job: Job) -> tuple[np.ndarray, TokenMeta]:
    """The tokens that a song's record names."""
    return unpack(await flow.store.get(str(job.tokens_key)), job.job_id)


async def go_on(
    flow: Flow, parent: Job, frames: int, request: GenerateRequest, *, least: int = 0, copied: bool = True
) -> str:
    """Put a song into the queue that goes on after so many frames of its parent, a song or recording; returns its id.

    Without being `copied` the frames that it keeps are in no place of its own, as if they had got lost.
    """
    codes, meta = await tokens_of(flow, parent)
    kept = kept_tokens(parent, codes, meta.earlier, frames, windows_of(flow.settings))
    job = Job(
        schema=CONTINUED_SCHEMA,
        job_id=str(uuid.uuid4()),
        tenant=TENANT,
        request=request,
        created_at=time.time(),
        parent=Parent(
            job_id=None if parent.recording else parent.job_id,
            recording_id=parent.job_id if parent.recording else None,
            frames=frames,
            least_frames=max(frames, least),
            seeds=kept.seeds,
        ),
    )
    if copied:
        own = TokenMeta(job_id=job.job_id, model=meta.model, seed=meta.seed, ended=False, earlier=kept.earlier)
        await flow.store.put(kept_tokens_key(job.job_id), pack(kept.codes, own))
    await flow.jobs.create(job)
    await queue_tokens(flow.js._nc, job)
    return job.job_id
