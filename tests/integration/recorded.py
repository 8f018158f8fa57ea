"""Recordings, put into the queue as the gateway does it, and the codes that the trivial encoder makes of them."""

import hashlib
import io
import time

import msgspec
import numpy as np
import soundfile

from services.codec_worker.encoder.chunks import samples_of, whole_frames
from services.codec_worker.engines.trivial import TrivialEncoder
from shared.jobs.queues import queue_recording
from shared.jobs.recordings import recording_id
from shared.nats.subjects import TENANT
from shared.schema.base import RECORDING_SCHEMA
from shared.schema.job import Job, Recording
from shared.schema.request import GenerateRequest
from shared.storage.keys import recording_key, recording_part_key, recording_tokens_key
from shared.storage.token_file import unpack
from tests.integration.flow import Flow

RATE = 8000  # Hz
CHUNK_SECONDS = 29.76


def noise(seconds: float, *, seed: int = 0, channels: int = 1) -> np.ndarray:
    """Audio, int16 ``[samples, channels]``."""
    found: np.ndarray = np.random.default_rng(seed).integers(-999, 999, (round(seconds * RATE), channels), np.int16)
    return found


def flac(audio: np.ndarray) -> bytes:
    """A FLAC file of int16 audio."""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, RATE, "PCM_16", format="FLAC")
    return buffer.getvalue()


def recording_of(data: bytes, *, seconds: float, channels: int = 1) -> Job:
    """The record of an upload."""
    sha256 = hashlib.sha256(data).hexdigest()
    return Job(
        schema=RECORDING_SCHEMA,
        job_id=recording_id(TENANT, sha256),
        tenant=TENANT,
        request=GenerateRequest(lyrics="", seed=0, format="flac"),
        created_at=time.time(),
        recording=Recording(sha256=sha256, upload_bytes=len(data), upload_format="flac", channels=channels),
        audio_key=recording_key(TENANT, sha256),
        audio_bytes=len(data),
        duration_s=seconds,
        sample_rate=RATE,
    )


async def upload(flow: Flow, data: bytes, *, seconds: float, channels: int = 1) -> Job:
    """Store a FLAC file, its record, and the message about it; returns the record."""
    job = recording_of(data, seconds=seconds, channels=channels)
    await flow.store.put(str(job.audio_key), data)
    await flow.jobs.create(job)
    await queue_recording(flow.js._nc, job)
    return job


async def record(flow: Flow, audio: np.ndarray) -> Job:
    """Upload int16 audio ``[samples, channels]``."""
    return await upload(flow, flac(audio), seconds=len(audio) / RATE, channels=audio.shape[1])


def keys_of(job: Job) -> tuple[str, str, str]:
    """Keys of a recording's audio, of its tokens as the trivial encoder makes them, and of the first of these."""
    assert job.recording is not None
    tokens = recording_tokens_key(TENANT, job.recording.sha256, TrivialEncoder.identity)
    return str(job.audio_key), tokens, recording_part_key(tokens)


def codes_of(audio: np.ndarray) -> np.ndarray:
    """The codes of int16 audio that have no padding in them, int16 ``[8, T]``."""
    heard = (audio / np.float32(32768)).astype(np.float32).T
    steps = TrivialEncoder(0).encode(heard, RATE)
    codes = np.concatenate([step.codes for step in steps if step.codes is not None], axis=1)
    return codes[:, : whole_frames(samples_of(len(audio), RATE))]


async def assert_encoded(flow: Flow, job: Job, audio: np.ndarray) -> None:
    """Check that a record is that of an encoded recording, and that its tokens are the whole audio's."""
    assert (job.status, job.error) == ("completed", None)
    codes, meta = unpack(await flow.store.get(str(job.tokens_key)), job.job_id)
    assert np.array_equal(codes, codes_of(audio))
    assert (job.frames, meta.ended, meta.seed) == (codes.shape[1], True, 0)
    audio_key, tokens, _ = keys_of(job)
    assert await flow.keys("recordings/") == sorted([audio_key, tokens])


def cancelled(job: Job) -> Job:
    """The record of a recording whose deletion has begun."""
    return msgspec.structs.replace(job, status="cancelled", completed_at=time.time(), fencing_token=None)
