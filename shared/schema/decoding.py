"""Reads and checks messages from NATS. None of them is trusted: any user with the right can write them.

Every message, record, event, heartbeat and lease is read by `decode` or by a function here that also compares it with
its subject. What cannot be read raises `Unreadable` and is counted; readers skip it and go on.
"""

import re
from typing import Any, TypeVar

import msgspec
from prometheus_client import Counter

from shared.errors import Unreadable
from shared.schema.base import (
    DEFERRED_SCHEMA,
    JOB_ID,
    RECORDING_SCHEMA,
    SCHEMA,
    TENANT_NAME,
    UNFINISHED_SCHEMA,
)
from shared.schema.event import CloudEvent
from shared.schema.job import DecodeJob, Job, Parent, Recording, TokenJob
from shared.schema.listening import Listening
from shared.schema.worker import LeaseRecord, WorkerStatus

_T = TypeVar("_T")
_Order = TypeVar("_Order", bound=TokenJob | DecodeJob)

# One counter for the whole process, registered by the module that serves metrics.
UNREADABLE = Counter(
    "heartmula_unreadable",
    "Times that something in NATS could not be read and was skipped: a record, message, event, heartbeat, lease or "
    "report of listeners",
    ["what"],
    registry=None,
)
_KNOWN: dict[type, tuple[str, msgspec.json.Decoder[Any]]] = {
    kind: (what, msgspec.json.Decoder(kind))
    for kind, what in (
        (Job, "record"),
        (TokenJob, "message"),
        (DecodeJob, "message"),
        (CloudEvent, "event"),
        (WorkerStatus, "heartbeat"),
        (LeaseRecord, "lease"),
        (Listening, "listener"),
    )
}
for _what, _ in _KNOWN.values():
    UNREADABLE.labels(_what)  # shown as 0 from the start
# The newest schema that this version reads, of each kind; `SCHEMA` of the others.
_NEWEST: dict[type, int] = {
    Job: DEFERRED_SCHEMA,
    TokenJob: RECORDING_SCHEMA,
    DecodeJob: UNFINISHED_SCHEMA,
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[0-9A-Za-z_-]+(\.[0-9A-Za-z_-]+)*")  # of an object in its song's folder: no path


class _Versioned(msgspec.Struct):
    schema: int = 0


_versioned = msgspec.json.Decoder(_Versioned)


def decode(data: bytes | None, kind: type[_T]) -> _T:
    """Read one structure from any bytes. Raises `Unreadable` and nothing else."""
    what, decoder = _KNOWN[kind]
    try:
        found: _T = decoder.decode(data or b"")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(what, str(error)[:200], newer=_schema_of(data or b"") > _NEWEST.get(kind, SCHEMA)) from None
    except RecursionError:
        raise _unreadable(what, "it is nested too deeply") from None
    return found


def read_record(subject: str, data: bytes | None) -> Job:
    """A song's record, which has to be that of its subject and to name no other song's objects. Raises `Unreadable`."""
    job = decode(data, Job)
    _require_known("record", job)
    if subject.split(".")[2:] != [job.tenant, job.job_id] or not TENANT_NAME.fullmatch(job.tenant):
        raise _unreadable("record", "it names another song than its subject")
    _require_id("record", job.job_id)
    if job.deferred and job.not_before is None:
        raise _unreadable("record", "it waits, but for no time")
    if job.parent is not None:
        _require_parent(job.parent)
    if job.recording is not None:
        _require_recording(job, job.recording)
        return job
    parts = [("audio", part.key) for part in job.decode.parts] if job.decode else []
    for folder, key in [("tokens", job.tokens_key), ("audio", job.audio_key), *parts]:
        if key is not None and not _is_own(folder, job.job_id, key):
            raise _unreadable("record", f"its {folder} are not under {folder}/{job.job_id}/")
    return job


def read_order(subject: str, data: bytes, kind: type[_Order]) -> _Order:
    """A queue's message, which has to be about the song of its subject and its objects. Raises `Unreadable`."""
    order = decode(data, kind)
    _require_known("message", order)
    if subject.rpartition(".")[2] != order.job_id:
        raise _unreadable("message", "it names another song than its subject")
    _require_id("message", order.job_id)
    if not TENANT_NAME.fullmatch(order.tenant):
        raise _unreadable("message", "its tenant is no name")
    if isinstance(order, DecodeJob) and not _is_own("tokens", order.job_id, order.tokens_key):
        raise _unreadable("message", f"its tokens are not under tokens/{order.job_id}/")
    return order


def read_event(subject: str, data: bytes | None) -> CloudEvent:
    """An event, which has to be about the song of its subject. Raises `Unreadable`."""
    event = decode(data, CloudEvent)
    if subject.split(".")[2:3] != [event.data.job_id]:
        raise _unreadable("event", "it is about another song than its subject")
    _require_id("event", event.data.job_id)
    return event


def read_listening(subject: str, data: bytes | None) -> Listening:
    """What a gateway says of listeners, which has to be about the song of its subject. Raises `Unreadable`."""
    found = decode(data, Listening)
    if subject.rpartition(".")[2] != found.job_id:
        raise _unreadable("listener", "it is about another song than its subject")
    return found


def read_heartbeat(subject: str, data: bytes | None) -> WorkerStatus:
    """A heartbeat, which has to be that of the worker in its subject. Raises `Unreadable`."""
    worker = decode(data, WorkerStatus)
    if subject.split(".")[2:] != [worker.role, worker.instance]:
        raise _unreadable("heartbeat", "it is another worker's")
    return worker


def _require_known(what: str, found: Job | TokenJob | DecodeJob) -> None:
    if found.schema > _NEWEST[type(found)]:
        raise _unreadable(what, f"it was written by a newer version (schema {found.schema})", newer=True)


def _require_parent(parent: Parent) -> None:
    """Its ids become parts of subjects and keys, and its frames are read from its tokens."""
    given = [name for name in (parent.job_id, parent.recording_id) if name is not None]
    if len(given) != 1:
        raise _unreadable("record", "its parent is not one song or recording")
    if not JOB_ID.fullmatch(given[0]):
        raise _unreadable("record", "its parent's id is none")
    if not 1 <= parent.frames <= parent.least_frames:
        raise _unreadable("record", "it keeps no frame of its parent, or more than it may have")


def _require_recording(job: Job, recording: Recording) -> None:
    """Its hash becomes a part of keys, and its objects lie under that key."""
    if not _SHA256.fullmatch(recording.sha256):
        raise _unreadable("record", "its recording's hash is none")
    folder = f"recordings/{job.tenant}"
    for key in (job.tokens_key, job.audio_key):
        if key is not None and not _is_own(folder, recording.sha256, key):
            raise _unreadable("record", f"its objects are not under {folder}/{recording.sha256}/")


def _require_id(what: str, job_id: str) -> None:
    if not JOB_ID.fullmatch(job_id):
        raise _unreadable(what, "its job_id is none")


def _is_own(folder: str, job_id: str, key: str) -> bool:
    place = f"{folder}/{job_id}/"
    return key.startswith(place) and _NAME.fullmatch(key, len(place)) is not None


def _schema_of(data: bytes) -> int:
    """The schema version of what this version cannot read; 0 when there is none."""
    try:
        return _versioned.decode(data).schema
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0


def _unreadable(what: str, reason: str, *, newer: bool = False) -> Unreadable:
    if not newer:
        UNREADABLE.labels(what).inc()
    return Unreadable(reason, newer=newer)
