"""Recordings as they are stored once the encoder has made their tokens, without an upload or an encoder."""

import hashlib
import time
import uuid
from io import BytesIO
from typing import Any

import numpy as np
import soundfile

from shared.jobs.recordings import recording_id
from shared.jobs.store import JobStore
from shared.nats.subjects import TENANT
from shared.schema.base import RECORDING_SCHEMA
from shared.schema.job import Job, Recording
from shared.schema.request import GenerateRequest
from shared.storage.keys import recording_key, recording_tokens_key
from shared.storage.objects import ObjectStore
from shared.storage.token_file import TokenMeta, pack

RATE = 8_000  # Hz


async def put_recording(
    jobs: JobStore, store: ObjectStore, codes: np.ndarray, tenant: str = TENANT, **changes: Any
) -> Job:
    """Store a recording that is ready, with int16 `codes` ``[8, T]`` and that much silence; fields may be changed."""
    sha256, samples = hashlib.sha256(uuid.uuid4().bytes).hexdigest(), codes.shape[1] * RATE * 80 // 1000
    name, key = recording_id(tenant, sha256), recording_tokens_key(tenant, sha256, "an encoder")
    file = BytesIO()
    soundfile.write(file, np.zeros(samples, np.int16), RATE, format="FLAC")
    await store.put(recording_key(tenant, sha256), file.getvalue(), "audio/flac")
    await store.put(key, pack(codes, TokenMeta(job_id=name, model="an encoder", seed=0)))
    fields: dict[str, Any] = {
        "request": GenerateRequest(lyrics="", title="Humming", seed=0),
        "status": "completed",
        "tokens_key": key,
        "frames": codes.shape[1],
    }
    job = Job(
        schema=RECORDING_SCHEMA,
        job_id=name,
        tenant=tenant,
        created_at=time.time(),
        recording=Recording(sha256=sha256, upload_bytes=len(file.getvalue()), upload_format="flac", channels=1),
        audio_key=recording_key(tenant, sha256),
        audio_bytes=len(file.getvalue()),
        duration_s=samples / RATE,
        sample_rate=RATE,
        **(fields | changes),
    )
    await jobs.create(job)
    return job
