"""Reading from NATS: a message is what its subject says, or is rejected."""

import msgspec
import pytest

from shared.errors import Unreadable
from shared.nats.subjects import decode_subject, event_subject, job_subject, token_subject
from shared.schema.base import CONTINUED_SCHEMA, DEFERRED_SCHEMA
from shared.schema.decoding import UNREADABLE, decode, read_event, read_heartbeat, read_order, read_record
from shared.schema.event import CloudEvent, Progress, cloud_event
from shared.schema.job import DecodeJob, Job, Parent, TokenJob
from shared.schema.request import GenerateRequest
from shared.schema.worker import GpuFigures, LeaseRecord, WorkerStatus

JOB = Job(job_id="a", tenant="local", request=GenerateRequest(lyrics="la"), created_at=1.0)
CONTINUED = msgspec.structs.replace(
    JOB, schema=CONTINUED_SCHEMA, parent=Parent(job_id="b", frames=5, least_frames=130, seeds=(7, 2**53 - 1))
)
NESTED = (b"[" * 30_000, b'{"x":' * 30_000, b'{"x":' + b"[" * 3000 + b"]" * 3000 + b"}")
KINDS: dict[type, str] = {
    Job: "record",
    TokenJob: "message",
    DecodeJob: "message",
    CloudEvent: "event",
    WorkerStatus: "heartbeat",
    LeaseRecord: "lease",
}


def counted(what: str) -> float:
    return float(UNREADABLE.labels(what)._value.get())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "data", [None, b"", b"{", b"{}", b"\xff", b'{"job_id":"\xff"}', b'{"role":"\\ud800"}', *NESTED]
)
def test_any_bytes_raise_one_error_and_it_is_counted(kind: type, data: bytes | None) -> None:
    before = counted(KINDS[kind])
    with pytest.raises(Unreadable) as caught:
        decode(data, kind)
    assert not caught.value.newer
    assert counted(KINDS[kind]) == before + 1


def test_a_newer_version_is_no_junk() -> None:
    before = counted("record"), counted("message")
    newer = DEFERRED_SCHEMA + 1
    for data in (
        msgspec.json.encode(msgspec.structs.replace(JOB, schema=newer)),
        f'{{"schema":{newer},"status":"resting"}}',
    ):
        with pytest.raises(Unreadable) as caught:
            read_record("$KV.JOBS.local.a", data if isinstance(data, bytes) else data.encode())
        assert caught.value.newer
    order = TokenJob(schema=newer, job_id="elsewhere", tenant="a new kind")
    with pytest.raises(Unreadable) as caught:
        read_order("jobs.tok.high.a", msgspec.json.encode(order), TokenJob)
    assert caught.value.newer
    assert (counted("record"), counted("message")) == before


def test_a_song_that_waits_for_its_time_says_which() -> None:
    later = msgspec.structs.replace(JOB, schema=DEFERRED_SCHEMA, not_before=5.0, deferred=True)
    assert read_record("$KV.JOBS.local.a", msgspec.json.encode(later)) == later
    with pytest.raises(Unreadable, match="for no time") as caught:
        read_record("$KV.JOBS.local.a", msgspec.json.encode(msgspec.structs.replace(later, not_before=None)))
    assert not caught.value.newer


def test_a_song_that_goes_on_from_another_one_is_read_and_what_is_damaged_of_it_is_junk() -> None:
    data = msgspec.json.encode(CONTINUED)
    assert read_record("$KV.JOBS.local.a", data) == CONTINUED
    for order, subject in (
        (TokenJob(schema=CONTINUED_SCHEMA, job_id="a", tenant="local"), "jobs.tok.high.a"),
        (
            DecodeJob(
                schema=CONTINUED_SCHEMA,
                job_id="a",
                tenant="local",
                tokens_key="tokens/a/7.safetensors",
                first_frame=0,
                frames=9,
                last=True,
            ),
            "jobs.dec.a",
        ),
    ):
        assert read_order(subject, msgspec.json.encode(order), type(order)) == order
    before = counted("record")
    with pytest.raises(Unreadable) as caught:
        read_record("$KV.JOBS.local.a", data.replace(b'"frames":5', b'"frames":"five"'))
    assert not caught.value.newer
    assert counted("record") == before + 1


@pytest.mark.parametrize(
    ("parent", "words"),
    [
        (Parent(job_id="*", frames=5, least_frames=5), "parent's id"),
        (Parent(recording_id="../a", frames=5, least_frames=5), "parent's id"),
        (Parent(frames=5, least_frames=5), "not one song or recording"),
        (Parent(job_id="b", recording_id="c", frames=5, least_frames=5), "not one song or recording"),
        (Parent(job_id="b", frames=0, least_frames=5), "keeps no frame"),
        (Parent(job_id="b", frames=6, least_frames=5), "more than it may have"),
    ],
)
def test_a_parent_is_one_song_or_recording_of_which_something_is_kept(parent: Parent, words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        read_record("$KV.JOBS.local.a", msgspec.json.encode(msgspec.structs.replace(CONTINUED, parent=parent)))


@pytest.mark.parametrize("subject", ["$KV.JOBS.local.b", "$KV.JOBS.bob.a", "$KV.JOBS.local.a.b", "$KV.JOBS.a", ""])
def test_a_record_is_that_of_its_subject(subject: str) -> None:
    data = msgspec.json.encode(JOB)
    assert read_record("$KV.JOBS.local.a", data) == JOB
    with pytest.raises(Unreadable, match="another song"):
        read_record(subject, data)


@pytest.mark.parametrize("name", ["*", ">", "", "a b", "a_b", "a\n", "ä", "x" * 65, "..", "a/b"])
def test_no_job_id_is_a_wildcard_or_a_path(name: str) -> None:
    with pytest.raises(Unreadable):
        read_record(f"$KV.JOBS.local.{name}", msgspec.json.encode(msgspec.structs.replace(JOB, job_id=name)))
    with pytest.raises(Unreadable):
        read_order(f"jobs.tok.high.{name}", msgspec.json.encode(TokenJob(job_id=name, tenant="local")), TokenJob)
    event = cloud_event(Progress(job_id=name, status="generating", progress=1, done=1, total=2), "1")
    with pytest.raises(Unreadable):
        read_event(f"events.local.{name}.progress", msgspec.json.encode(event))


@pytest.mark.parametrize("tenant", ["*", ">", "", "a b", "a.b"])
def test_no_tenant_is_a_wildcard(tenant: str) -> None:
    with pytest.raises(Unreadable):
        read_order("jobs.tok.high.a", msgspec.json.encode(TokenJob(job_id="a", tenant=tenant)), TokenJob)
    with pytest.raises(Unreadable):
        read_record(f"$KV.JOBS.{tenant}.a", msgspec.json.encode(msgspec.structs.replace(JOB, tenant=tenant)))


@pytest.mark.parametrize(
    "name",
    ["b/1.safetensors", "a", "a/", "a/..", "a/../b/1", "a/.1", "a//1", "a/b/1", "a/1\n", "a/%2e%2e", "", "/a/1"],
)
def test_objects_lie_in_the_folder_of_their_song(name: str) -> None:
    good = "tokens/a/7.safetensors"
    order = DecodeJob(job_id="a", tenant="local", tokens_key=good, first_frame=0, frames=1, last=True)
    assert read_order("jobs.dec.a", msgspec.json.encode(order), DecodeJob) == order
    order = msgspec.structs.replace(order, tokens_key=f"tokens/{name}")
    with pytest.raises(Unreadable, match="not under tokens/a/"):
        read_order("jobs.dec.a", msgspec.json.encode(order), DecodeJob)
    for folder in ("tokens", "audio"):
        other = {"tokens": "audio", "audio": "tokens"}[folder]
        for key in (f"{folder}/{name}", f"{other}/a/1", ""):
            job = msgspec.structs.replace(JOB, **{f"{folder}_key": key})
            with pytest.raises(Unreadable, match=f"not under {folder}/a/"):
                read_record("$KV.JOBS.local.a", msgspec.json.encode(job))


def test_a_heartbeat_is_that_of_its_subject() -> None:
    gpu = GpuFigures(id="g", name="g", kind="cpu", memory_total=1, memory_used=0)
    worker = WorkerStatus(
        role="codec",
        instance="i",
        host="h",
        pid=1,
        engine="e",
        model="m",
        gpu=gpu,
        state="idle",
        since=1.0,
        sent=1.0,
    )
    data = msgspec.json.encode(worker)
    assert read_heartbeat("$KV.WORKERS.codec.i", data) == worker
    for subject in ("$KV.WORKERS.codec.j", "$KV.WORKERS.tokenizer.i", "$KV.WORKERS.codec.i.j"):
        with pytest.raises(Unreadable):
            read_heartbeat(subject, data)


def test_times_that_no_calendar_has_are_not_read() -> None:
    for created in (-1.0, 1e300, 1e12):
        with pytest.raises(Unreadable):
            read_record("$KV.JOBS.local.a", msgspec.json.encode(msgspec.structs.replace(JOB, created_at=created)))


@pytest.mark.parametrize("name", ["*", ">", "a.b", "a b", "", "\t"])
def test_no_subject_is_built_of_a_wildcard(name: str) -> None:
    for build in (decode_subject, lambda n: token_subject("high", n), lambda n: event_subject("local", n, "stage")):
        with pytest.raises(ValueError, match="NATS subject"):
            build(name)
    with pytest.raises(ValueError, match="NATS subject"):
        job_subject("local", name)
