"""Values of every structure that one process writes and another one reads, and how each is written and read.

The bytes that were written for these values lie in `data/stored.json`, tokens beside it as files.
"""

import fcntl
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deploy.local.credentials import Credentials, load_credentials
from services.gateway.auth.api_keys import digest_of_key
from services.gateway.background.webhooks.payload import AudioPayload, Payload, audio_payload_of, payload_of, sign
from services.gateway.songs.index import cursor_of, place_of
from services.gateway.submission.idempotency import digest_of, songs_of
from shared.audio.peaks import PeaksBody, peaks_of
from shared.device.lease_queue import LeaseView, read_view
from shared.device.ledger import DeviceLedger
from shared.jobs.recordings import recording_id
from shared.jobs.store import released
from shared.nats.subjects import decode_subject, event_subject, job_subject, listen_subject, token_subject
from shared.schema.base import CONTINUED_SCHEMA, DEFERRED_SCHEMA, RECORDING_SCHEMA, UNFINISHED_SCHEMA, timestamp
from shared.schema.decoding import decode, read_event, read_heartbeat, read_listening, read_order, read_record
from shared.schema.event import (
    AnyEvent,
    Audio,
    Cancelled,
    CloudEvent,
    Completed,
    Failed,
    Progress,
    Queued,
    Stage,
    cloud_event,
)
from shared.schema.job import AudioPart, AudioWebhook, Decode, DecodeJob, Job, Parent, Recording, TokenJob
from shared.schema.listening import Listening
from shared.schema.request import ContinueFrom, GenerateRequest
from shared.schema.worker import GpuFigures, LeaseRecord, MemoryPlan, PhaseMemory, WorkerStatus
from shared.storage.keys import recording_key, recording_tokens_key
from shared.storage.token_file import EarlierWindow, TokenMeta, pack, unpack

JOB, OTHER = "5f0c4f0a-9a37-42b0-8f6c-7d116d2ce1a5", "0b9c2f5e-1d3a-4c57-9e80-6a2f4b1c8d70"
TENANT = "alice"
BEGAN = 1_767_225_600.25  # 2026-01-01T00:00:00.250Z
TOKENS, AUDIO = f"tokens/{JOB}/41.safetensors", f"audio/{JOB}/57.ogg"


@dataclass(frozen=True)
class Stored:
    """A value, and the code that writes it and reads it."""

    value: Any
    write: Callable[[Any], bytes]
    read: Callable[[bytes], Any]
    earlier: bool = False  # the bytes are an earlier version's, and are no longer written so


# --- requests and records

SHORT = GenerateRequest(lyrics="[Verse]\nHello world", max_duration_ms=20_000, seed=7)
FULL = GenerateRequest(
    lyrics="[Chorus]\nÉtoile \u266a",
    tags="pop,piano",
    max_duration_ms=80,
    temperature=0.5,
    cfg_scale=1.0,
    topk=20,
    seed=2**53 - 1,
    format="ogg",
    title="Étoile",
    priority="high",
    webhook_url="https://songs.example/done",
    variants=4,
)

_QUEUED = Job(job_id=JOB, tenant="local", request=SHORT, created_at=BEGAN)
_VARIANT = Job(
    job_id=JOB,
    tenant=TENANT,
    request=msgspec.structs.replace(FULL, variants=1),
    tags_sent=" pop, piano",
    created_at=BEGAN,
    group=OTHER,
    variant=2,
    digest=digest_of(FULL),
)
_GENERATING = msgspec.structs.replace(
    _VARIANT, status="generating", started_at=BEGAN + 1, fencing_token=41, attempts=2, failures=1, tokens_key=TOKENS
)
_DECODING = msgspec.structs.replace(_GENERATING, status="decoding", fencing_token=57, attempts=1, remade=1, frames=250)
_ENDED = msgspec.structs.replace(_DECODING, fencing_token=None, completed_at=BEGAN + 60.5)
COMPLETED = msgspec.structs.replace(
    _ENDED, status="completed", audio_key=AUDIO, audio_bytes=123_456, duration_s=20.0, sample_rate=48_000
)
FAILED = msgspec.structs.replace(_ENDED, status="failed", error="the song raised 3 errors")
CANCELLED = msgspec.structs.replace(_QUEUED, status="cancelled", completed_at=BEGAN + 2)
_PARTS = tuple(
    AudioPart(key=f"audio/{JOB}/{fence}.{window}.part", size=1_900_000 + window, samples=1_228_800)
    for window, fence in enumerate((43, 45))
)
HEARD = msgspec.structs.replace(
    _GENERATING,
    webhook_events=("ended", "audio"),
    audio_webhook=AudioWebhook(since=BEGAN + 30, again=BEGAN + 55, calling=True),
    saved_frames=692,
    decode=Decode(fencing_token=45, attempts=1, failures=1, lane="high", sample_rate=48_000, parts=_PARTS),
)
# All fields of these existed before songs could be heard while they are made.
EARLIER_RECORDS = {
    "queued": _QUEUED,
    "queued, a variant": _VARIANT,
    "queued again for its tokens": msgspec.structs.replace(
        _DECODING, status="queued", tokens_key=None, fencing_token=None
    ),
    "generating": _GENERATING,
    "decoding": _DECODING,
    "completed": COMPLETED,
    "failed": FAILED,
    "cancelled": CANCELLED,
}
# And these before songs could go on from one another.
RECORDS_WITHOUT_PARENTS = {
    **EARLIER_RECORDS,
    "generating, can be heard": HEARD,
    "completed, was heard before": msgspec.structs.replace(
        COMPLETED,
        webhook_events=("audio",),
        audio_webhook=AudioWebhook(since=BEGAN + 30, again=None),
        first_part=_PARTS[0].key,
    ),
}
CONTINUED = msgspec.structs.replace(
    _QUEUED, schema=CONTINUED_SCHEMA, parent=Parent(job_id=OTHER, frames=700, least_frames=825, seeds=(3, 2**53 - 1))
)
RECORDS_WITHOUT_RECORDINGS = {
    **RECORDS_WITHOUT_PARENTS,
    "queued, goes on from a song": CONTINUED,
    "queued, goes on from a recording": msgspec.structs.replace(
        CONTINUED, parent=Parent(recording_id=OTHER, frames=1, least_frames=1)
    ),
}
_SHA256 = hashlib.sha256(b"an upload").hexdigest()
RECORDING = Job(
    schema=RECORDING_SCHEMA,
    job_id=recording_id("local", _SHA256),
    tenant="local",
    request=GenerateRequest(lyrics="", title="Humming", seed=0),
    created_at=BEGAN,
    recording=Recording(sha256=_SHA256, upload_bytes=9_000_000, upload_format="mp3", channels=2),
    audio_key=recording_key("local", _SHA256),
    audio_bytes=22_000_000,
    duration_s=181.5,
    sample_rate=44_100,
)
# And these before songs could be deferred, or were marked as instrumental.
RECORDS_WITHOUT_TIMES = {
    **RECORDS_WITHOUT_RECORDINGS,
    "queued, a recording": RECORDING,
    "generating, a recording": msgspec.structs.replace(
        RECORDING, status="generating", started_at=BEGAN + 2, fencing_token=12, attempts=1, saved_frames=372
    ),
    "completed, a recording": msgspec.structs.replace(
        RECORDING,
        status="completed",
        started_at=BEGAN + 2,
        completed_at=BEGAN + 60,
        frames=2268,
        tokens_key=recording_tokens_key("local", _SHA256, "an encoder"),
    ),
}
DEFERRED = msgspec.structs.replace(
    _QUEUED, schema=DEFERRED_SCHEMA, instrumental=True, not_before=BEGAN + 86_400, deferred=True
)
RECORDS = {
    **RECORDS_WITHOUT_TIMES,
    "queued, waits for its time": DEFERRED,
    "queued, waits for its time and goes on from a song": msgspec.structs.replace(
        CONTINUED, schema=DEFERRED_SCHEMA, not_before=BEGAN + 86_400, deferred=True, repeated=True
    ),
    "queued, its time has come": released(DEFERRED),
}


def _record(job: Job) -> Stored:
    return Stored(job, msgspec.json.encode, partial(read_record, job_subject(job.tenant, job.job_id)))


# --- queues

_TOKEN_JOB = TokenJob(job_id=JOB, tenant=TENANT)
_DECODE_JOB = DecodeJob(job_id=JOB, tenant=TENANT, tokens_key=TOKENS, first_frame=0, frames=250, last=True)
_WINDOWS_JOB = msgspec.structs.replace(_DECODE_JOB, schema=UNFINISHED_SCHEMA, frames=692, last=False)
_CONTINUED_JOB = msgspec.structs.replace(_TOKEN_JOB, schema=CONTINUED_SCHEMA)
_CONTINUED_DECODE_JOB = msgspec.structs.replace(_DECODE_JOB, schema=CONTINUED_SCHEMA)
_LISTENING = Listening(job_id=JOB, gateway="host-0a1b2c3d", listeners=2, buffered=12.5)

# --- events

EVENTS: dict[str, AnyEvent] = {
    "queued": Queued(job_id=JOB, status="queued", progress=0, queue_position=3, eta=timestamp(BEGAN + 90)),
    "queued, place unknown": Queued(job_id=JOB, status="queued", progress=0),
    "queued, waits for its time": Queued(job_id=JOB, status="queued", progress=0, not_before=timestamp(BEGAN + 86_400)),
    "stage": Stage(
        job_id=JOB, status="generating", progress=12.5, stage="generating", phase=2, frames=125, memory_used=6_000_000
    ),
    "stage, paused": Stage(job_id=JOB, status="generating", progress=12.5, stage="paused", frames=125),
    "stage, storing": Stage(job_id=JOB, status="decoding", progress=99, stage="storing"),
    "progress": Progress(job_id=JOB, status="generating", progress=40.0, done=125, total=250, rate=12.5),
    "progress, with eta": Progress(
        job_id=JOB, status="decoding", progress=89.5, done=5, total=10, eta=timestamp(BEGAN + 9)
    ),
    "audio": Audio(job_id=JOB, status="generating", progress=0.0, playable_seconds=51.2),
    "completed": Completed(
        job_id=JOB,
        status="completed",
        progress=100,
        result_url=f"/generate/{JOB}/result",
        duration_s=20.0,
        format="ogg",
        seed=7,
    ),
    "failed": Failed(job_id=JOB, status="failed", progress=40.0, error="the song raised 3 errors"),
    "cancelled": Cancelled(job_id=JOB, status="cancelled", progress=0.0),
}


def _event(event: AnyEvent) -> Stored:
    kind = str(type(event).__struct_config__.tag)
    value = CloudEvent(
        id="4711-18f3c0ffee-2", type=f"heartmula.song.{kind}", subject=JOB, time=timestamp(BEGAN), data=event
    )
    return Stored(value, _write_event, partial(read_event, event_subject(TENANT, JOB, kind)))


def _write_event(event: CloudEvent) -> bytes:
    """Wrap the event as a publisher does, but at the time of the example."""
    return msgspec.json.encode(msgspec.structs.replace(cloud_event(event.data, event.id), time=event.time))


# --- workers and the lease

_CPU = GpuFigures(id="cpu-host", name="CPU", kind="cpu", memory_total=2**34, memory_used=0)
_CUDA = GpuFigures(
    id="GPU-1", name="NVIDIA L4", kind="cuda", memory_total=2**34, memory_used=2**33, utilization=97, temperature=64
)
_IDLE = WorkerStatus(
    role="codec",
    instance="codec-host-1",
    host="host",
    pid=12,
    engine="trivial",
    model="trivial",
    gpu=_CPU,
    state="idle",
    since=BEGAN,
    sent=BEGAN + 5,
)
WORKING = WorkerStatus(
    role="tokenizer",
    instance="tokenizer-host-2",
    host="host",
    pid=13,
    engine="native",
    model="HeartMuLa-oss-3B",
    gpu=_CUDA,
    state="working",
    phase=2,
    resident=["HeartMuLa-oss-3B"],
    jobs=[JOB],
    slots=8,
    rate=96.5,
    song_frames=1500.0,
    memory=[
        PhaseMemory(phase=1, device_before=0, device_after=2**33, host=2**30),
        PhaseMemory(phase=2, device_before=2**33, host=2**30),
    ],
    plan=MemoryPlan(
        resident=True,
        capacity=2**34,
        kept_back=2**29,
        contexts=2**30,
        language_model=7_089_873_664,
        language_model_work=142_606_336,
        language_model_dtype="bfloat16",
        int8="off",
        codec=3_149_927_680,
        codec_work=992_698_368,
        codec_dtype="bfloat16",
        for_songs=3 * 10**9,
        songs=[12, 7, 5],
    ),
    notes=["frames are made without Triton kernels: no C compiler was found"],
    problem="the last song raised an error",
    movement=99,
    failed_writes=1,
    since=BEGAN,
    sent=BEGAN + 5,
)
_WITHOUT_PLAN = msgspec.structs.replace(WORKING, plan=None, notes=[])
_WAITING = LeaseRecord(ticket=0, state="waiting", role="codec", owner="codec-host-1", since=BEGAN)
_HELD = LeaseRecord(ticket=40, state="held", role="tokenizer", owner="tokenizer-host-2", phase=2, since=BEGAN)
LEASE_SUBJECT = "$KV.GPU_LOCK.GPU-1.tokenizer.tokenizer-host-2"
LEASE_VIEW = LeaseView("GPU-1", "tokenizer", "tokenizer-host-2", "held", 2, BEGAN, 40, 41, 10)


def _heartbeat(status: WorkerStatus) -> Stored:
    return Stored(status, msgspec.json.encode, partial(read_heartbeat, f"$KV.WORKERS.{status.role}.{status.instance}"))


def _lease(record: LeaseRecord) -> Stored:
    return Stored(record, msgspec.json.encode, lambda data: decode(data, LeaseRecord))


def lease_view(data: bytes) -> LeaseView:
    """Read the held lease as another candidate does."""
    return read_view(LEASE_SUBJECT, data, 41, {"Nats-TTL": "10s"})


# --- files and objects

_SAMPLES = np.stack([np.arange(2000) * 37 % 20_001 - 10_000, np.arange(2000)], axis=1).astype(np.int16)
_POINTS = [-19, -1, -1, 18, -18, 20, -2, 17, -17, 21, -3, 16, -16, 22, -4, 12]  # lowest and highest in turn
_PEAKS = PeaksBody(sample_rate=48_000, samples_per_pixel=256, length=8, data=_POINTS)
_CREDENTIALS = Credentials(**{name: f"{number:04d}" for number, name in enumerate(Credentials.__struct_fields__)})
CODES = (np.arange(8 * 3, dtype=np.int16).reshape(8, 3) * 341).astype(np.int16)


def _read_credentials(data: bytes) -> Credentials:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "credentials.json"
        path.write_bytes(data)
        found = load_credentials(Path(folder))
        assert path.read_bytes() == data, "reading credentials wrote the file anew"
    return found


def _write_credentials(credentials: Credentials) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "credentials.json"
        path.write_bytes(msgspec.json.encode(credentials))
        load_credentials(Path(folder))
        return path.read_bytes()


_ACCOUNT = "codec.codec-1"


def _write_account(account: dict[str, int]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        ledger = DeviceLedger(Path(folder), _ACCOUNT, 2**34)
        for label, nbytes in account.items():
            ledger.place(label, nbytes)
        data = (Path(folder) / f"{_ACCOUNT}.account").read_bytes()
        ledger.close()
    return data


def _read_account(data: bytes) -> dict[str, int]:
    """Read the account of a living process, whose file is locked, as another process does."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / f"{_ACCOUNT}.account").open("wb+", 0) as file:
        file.write(data)
        fcntl.flock(file, fcntl.LOCK_EX)
        ledger = DeviceLedger(Path(folder), "tokenizer.tokenizer-1", 2**34)
        found = {resident.label: resident.nbytes for resident in ledger.residents() if resident.owner == _ACCOUNT}
        ledger.close()
    return found


STORED: dict[str, Stored] = {
    **{f"record: {name}": _record(job) for name, job in RECORDS.items()},
    **{f"record: {name}, before streams": replace(_record(job), earlier=True) for name, job in EARLIER_RECORDS.items()},
    **{
        f"record: {name}, before parents": replace(_record(job), earlier=True)
        for name, job in RECORDS_WITHOUT_PARENTS.items()
    },
    **{
        f"record: {name}, before recordings": replace(_record(job), earlier=True)
        for name, job in RECORDS_WITHOUT_RECORDINGS.items()
    },
    **{
        f"record: {name}, before times": replace(_record(job), earlier=True)
        for name, job in RECORDS_WITHOUT_TIMES.items()
    },
    "token job": Stored(
        _TOKEN_JOB, msgspec.json.encode, lambda data: read_order(token_subject("high", JOB), data, TokenJob)
    ),
    "decode job": Stored(
        _DECODE_JOB, msgspec.json.encode, lambda data: read_order(decode_subject(JOB), data, DecodeJob)
    ),
    "decode job, of windows": Stored(
        _WINDOWS_JOB, msgspec.json.encode, lambda data: read_order(decode_subject(JOB, "high"), data, DecodeJob)
    ),
    "token job, of a song that goes on from another one": Stored(
        _CONTINUED_JOB, msgspec.json.encode, lambda data: read_order(token_subject("high", JOB), data, TokenJob)
    ),
    "decode job, of a song that goes on from another one": Stored(
        _CONTINUED_DECODE_JOB, msgspec.json.encode, lambda data: read_order(decode_subject(JOB), data, DecodeJob)
    ),
    "listeners": Stored(_LISTENING, msgspec.json.encode, partial(read_listening, listen_subject(JOB))),
    **{f"event: {name}": _event(event) for name, event in EVENTS.items()},
    **{
        f"event: {name}, before times": replace(_event(EVENTS[name]), earlier=True)
        for name in ("queued", "queued, place unknown")
    },
    "heartbeat: idle": _heartbeat(_IDLE),
    "heartbeat: working": _heartbeat(WORKING),
    "heartbeat: idle, before plans": replace(_heartbeat(_IDLE), earlier=True),
    "heartbeat: working, before plans": replace(_heartbeat(_WITHOUT_PLAN), earlier=True),
    "lease: waiting": _lease(_WAITING),
    "lease: held": _lease(_HELD),
    "peaks": Stored(_PEAKS, lambda _: peaks_of([_SAMPLES], 48_000), partial(msgspec.json.decode, type=PeaksBody)),
    **{
        f"webhook: {job.status}": Stored(
            payload_of(job), msgspec.json.encode, partial(msgspec.json.decode, type=Payload)
        )
        for job in (COMPLETED, FAILED, CANCELLED)
    },
    "webhook: audio": Stored(
        audio_payload_of(HEARD), msgspec.json.encode, partial(msgspec.json.decode, type=AudioPayload)
    ),
    "cursor of a list": Stored(
        (BEGAN + 0.125, JOB), lambda place: cursor_of(place).encode(), lambda data: place_of(data.decode())
    ),
    "credentials of the local stack": Stored(_CREDENTIALS, _write_credentials, _read_credentials),
    "account on a device": Stored({"HeartCodec-oss": 3_200_000, "work": 5}, _write_account, _read_account),
}


def tokens(*, ended: bool) -> Stored:
    """The file of a song's tokens, whole or as saved while it is made."""
    meta = TokenMeta(job_id=JOB, model="HeartMuLa-oss-3B", seed=7, first_frame=0 if ended else 3, ended=ended)

    def read(data: bytes) -> Any:
        codes, found = unpack(data, JOB)
        return codes.dtype.name, codes.tolist(), found

    return Stored(("int16", CODES.tolist(), meta), lambda _: pack(CODES, meta), read)


def completed_tokens() -> Stored:
    """The file of the tokens of a completed song: of one that went on from another one."""
    window = EarlierWindow(window=0, frames=2, seed=3, codes=CODES)
    meta = TokenMeta(
        job_id=JOB, model="HeartMuLa-oss-3B", seed=7, earlier=(window,), tags="pop,piano", lyrics="la", version="0.1.0"
    )

    def read(data: bytes) -> Any:
        codes, found = unpack(data, JOB)
        windows = [(item.window, item.frames, item.seed, item.codes.tolist()) for item in found.earlier]
        return codes.tolist(), windows, replace(found, earlier=())

    value = (CODES.tolist(), [(0, 2, 3, CODES.tolist())], replace(meta, earlier=()))
    return Stored(value, lambda _: pack(CODES, meta), read)


TOKEN_FILES = {
    "tokens.safetensors": tokens(ended=True),
    "saved.safetensors": tokens(ended=False),
    "completed.safetensors": completed_tokens(),
}


def derived() -> dict[str, Any]:
    """What follows from values alone and is compared again later: ids, digests, signatures."""
    return {
        "song ids of a key": songs_of("order-1", 3, TENANT),
        "song id of a key without tenants": songs_of("order-1", 1),
        "digest of a short request": digest_of(SHORT),
        "digest of a full request": digest_of(FULL),
        "digest of a request with webhook events": digest_of(msgspec.structs.replace(FULL, webhook_events=("audio",))),
        "digest of a request that goes on from a song": digest_of(
            msgspec.structs.replace(SHORT, continue_from=ContinueFrom(job_id=OTHER, at_ms=64_000), min_new_ms=5_000)
        ),
        "digest of a request that goes on from a song's end": digest_of(
            msgspec.structs.replace(SHORT, continue_from=ContinueFrom(job_id=OTHER))
        ),
        "digest of a request for a song without words at a time": digest_of(
            msgspec.structs.replace(
                SHORT, instrumental=True, not_before=datetime(2026, 1, 31, 19, tzinfo=timezone(timedelta(hours=1)))
            )
        ),
        "digest of an API key": digest_of_key("hm_example"),
        "signature of a webhook": sign(b"0123456789abcdef01234567", f"{JOB}-completed", 1_767_225_661, b"{}"),
    }
