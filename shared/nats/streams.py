"""Every stream, consumer and bucket, and the bootstrap that creates them.

`bootstrap` is idempotent and runs before the services (`python -m deploy.setup`), which only check.
Why each setting is what it is: docs/topology.md.
"""

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    PersistMode,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, BadRequestError

from shared.causes import describe_error
from shared.errors import NotFound, Unavailable
from shared.nats.errors import nats_errors
from shared.nats.subjects import (
    DEC,
    DEC_CONSUMERS,
    DEC_SUBJECTS,
    ENC_CONSUMERS,
    ENC_SUBJECT,
    EVENTS,
    FAULTS,
    GPU_LOCK,
    HOOKS_CONSUMER,
    HOOKS_DELIVERY,
    HOOKS_GROUP,
    INTAKE,
    INTAKE_CONSUMER,
    JOBS,
    TOK,
    TOK_CONSUMERS,
    WORKERS,
    decode_subject,
    encode_subject,
    intake_queue_subject,
    token_subject,
)
from shared.schema.request import MAX_BODY, Priority
from shared.settings import Settings

DAY = 86400.0

JOB_TTL = 7 * DAY  # records
WORKER_TTL = 15.0
LOCK_MARKER_TTL = 60
INTAKE_MESSAGES = 1_000  # of a tenant that wait to be submitted
INTAKE_ACK_WAIT = 60.0  # seconds; a submission takes eight while a server is away
_HEADERS = 4 * 1024  # bytes, that a message may have beside its body
LOCK_MAX_AGE = 60.0  # cuts TTLs: no shorter than that of a marker, nor than the longest HEARTMULA_LEASE_TTL
# Streams that grow with the number of songs get a part of the account's storage, so that the rest, the lease above all,
# always finds room. JetStream reserves what is asked for: where there is less, less is asked for.
_SHARES = {f"KV_{JOBS}": 1 / 2, EVENTS: 1 / 4, FAULTS: 1 / 16, INTAKE: 1 / 16}
_STORAGE = 2 << 30  # bytes, where the account has no limit of its own
_LEAST_STORAGE = 32 << 20  # bytes
_TOO_LITTLE_STORAGE = 10047


def _queue(name: str, subjects: list[str], limit: int) -> StreamConfig:
    return StreamConfig(
        name=name,
        subjects=subjects,
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        max_msgs=limit,
        max_msgs_per_subject=1,
        discard_new_per_subject=True,
        max_msg_size=64 * 1024,
        duplicate_window=3600,
        allow_direct=True,
        allow_atomic=True,  # the variants of a song are queued all or not at all
    )


def _bucket(name: str, **settings: Any) -> StreamConfig:
    """A KV bucket. It is made as a stream, because nats-py hides half of the settings of buckets."""
    return StreamConfig(
        name=f"KV_{name}",
        subjects=[f"$KV.{name}.>"],
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        max_msgs_per_subject=1,
        allow_rollup_hdrs=True,
        deny_delete=True,
        **settings,
    )


def streams(queue_limit: int, replicas: int = 1, storage: int = _STORAGE) -> list[StreamConfig]:
    """Every stream and bucket; `storage`, in bytes, is what all their replicas together may take."""
    found = _streams(queue_limit)
    for stream in found:
        stream.num_replicas = replicas
        if share := _SHARES.get(stream.name or ""):
            stream.max_bytes = int(share * storage / replicas)
        if replicas > 1:  # replicated streams have no other way, and need none: an answer awaits a majority, not a disk
            stream.persist_mode = None
    return found


def _streams(queue_limit: int) -> list[StreamConfig]:
    advisory = "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED"
    return [
        _queue(TOK, ["jobs.tok.*.*"], queue_limit),
        # Larger than TOK: a song whose tokens were paid for must always find room.
        _queue(DEC, [*DEC_SUBJECTS.values(), ENC_SUBJECT], 4 * queue_limit),
        StreamConfig(
            name=INTAKE,
            subjects=[intake_queue_subject("*")],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_msgs_per_subject=INTAKE_MESSAGES,
            discard_new_per_subject=True,
            max_msg_size=MAX_BODY + _HEADERS,
            # Songs have ids that follow from their keys, for a week. This only spares repetitions the way there.
            duplicate_window=120,
            allow_direct=True,
        ),
        StreamConfig(
            name=EVENTS,
            subjects=["events.*.*.*"],
            storage=StorageType.FILE,
            persist_mode=PersistMode.ASYNC,  # with sync always, a file stream stalls at 1,000 events a second
            max_age=DAY,
            max_msgs_per_subject=200,
            # The end of a song may be published again when its message of the other lane gets its turn.
            duplicate_window=3600,
            allow_direct=True,
        ),
        StreamConfig(
            name=FAULTS,
            subjects=["dead.*.*", f"{advisory}.{TOK}.*", f"{advisory}.{DEC}.*"],
            storage=StorageType.FILE,
            max_age=7 * DAY,
            max_msgs=10_000,
        ),
        _bucket(JOBS, max_age=JOB_TTL, allow_direct=True),
        # No direct gets: a follower's stale answer must never decide who holds the device.
        # An age beside the keys' own TTLs: after crashes the server forgets those, and old leases come back.
        _bucket(
            GPU_LOCK,
            max_age=LOCK_MAX_AGE,
            allow_direct=False,
            allow_msg_ttl=True,
            subject_delete_marker_ttl=LOCK_MARKER_TTL,
        ),
        _bucket(WORKERS, max_age=WORKER_TTL, allow_direct=True),
    ]


def consumers(ack_wait: float) -> list[tuple[str, ConsumerConfig]]:
    """Every durable consumer with its stream. Two lanes are the priority."""

    def pull(name: str, subject: str) -> ConsumerConfig:
        # Deliveries are unlimited: attempts are counted in the job record, where giving a song back costs none.
        return ConsumerConfig(
            durable_name=name,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ack_wait,
            max_deliver=-1,
            filter_subject=subject,
        )

    lanes = [(TOK, pull(name, f"jobs.tok.{lane}.*")) for lane, name in TOK_CONSUMERS.items()]
    lanes += [(DEC, pull(DEC_CONSUMERS[lane], subject)) for lane, subject in DEC_SUBJECTS.items()]
    lanes += [(DEC, pull(name, ENC_SUBJECT)) for name in ENC_CONSUMERS.values()]
    # Pushed to one of the gateways: each record at once, and again after the time that a gateway asks for.
    hooks = ConsumerConfig(
        durable_name=HOOKS_CONSUMER,
        deliver_subject=HOOKS_DELIVERY,
        deliver_group=HOOKS_GROUP,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=60,
        max_deliver=-1,
        max_ack_pending=100_000,  # webhooks that wait for their next try are pending, and must not stop the others
    )
    # Requests that wait for their next try are pending too, and must not stop those of other tenants.
    intake = replace(
        pull(INTAKE_CONSUMER, intake_queue_subject("*")), ack_wait=INTAKE_ACK_WAIT, max_ack_pending=100_000
    )
    return [*lanes, (f"KV_{JOBS}", hooks), (INTAKE, intake)]


async def bootstrap(js: JetStreamContext, settings: Settings) -> None:
    """Create or update every stream, bucket and consumer. Raises `Unavailable` when JetStream does not answer."""
    try:
        with nats_errors("JetStream could not be set up"):
            await _put_everything(js, settings)
    except NotFound as error:  # a cluster that is electing leaders
        raise Unavailable("nats", str(error)) from error


async def _put_everything(js: JetStreamContext, settings: Settings) -> None:
    limit = (await js.account_info()).limits.max_storage
    storage = limit if limit and limit > 0 else _STORAGE
    while True:
        try:
            await _put_streams(js, streams(settings.queue_limit, settings.nats_replicas, storage))
            break
        except APIError as error:
            if error.err_code != _TOO_LITTLE_STORAGE:
                raise
            storage //= 2
            if storage < _LEAST_STORAGE:
                raise Unavailable(
                    "nats",
                    "JetStream has not even 32 MiB of storage left to reserve: give it a larger max_file_store, or "
                    "reserve less for other streams",
                ) from error
    for name, consumer in consumers(ack_wait(settings)):
        await js.add_consumer(name, consumer)


async def _put_streams(js: JetStreamContext, wanted: list[StreamConfig]) -> None:
    for stream in wanted:
        # Two services that start together may both find the stream missing; the server takes equal settings twice.
        try:
            await js.add_stream(stream)
        except BadRequestError as error:
            if error.err_code != 10058:  # exists with other settings
                raise
            await js.update_stream(stream)


async def require_streams(js: JetStreamContext) -> None:
    """Check that every stream, bucket and consumer exists. Raises `Unavailable`.

    Services may not create streams: the right to create them includes the right to delete them.
    """
    known = [stream.name or "" for stream in streams(1)]
    durable = [(stream, consumer.durable_name or "") for stream, consumer in consumers(1)]
    try:
        with nats_errors("JetStream does not answer"):
            await asyncio.gather(
                *(js.stream_info(name) for name in known), *(js.consumer_info(stream, name) for stream, name in durable)
            )
    except NotFound as error:
        missing = describe_error(error.__cause__ or error)
        raise Unavailable("nats", f"NATS is not set up ({missing}): run `python -m deploy.setup`") from error


def ack_wait(settings: Settings) -> float:
    """Seconds without a sign of life after which a message is redelivered to another worker; follows the lease."""
    return 2.0 * settings.lease_ttl


async def songs_in_lane(js: JetStreamContext, lane: Priority) -> set[str]:
    """The songs with a message in a lane of the queue for audio, waiting or being worked on.

    Raises the errors of nats-py: call it in `nats_errors`.
    """
    info = await js.stream_info(DEC, subjects_filter=DEC_SUBJECTS[lane])
    return {subject.rpartition(".")[2] for subject in info.state.subjects or ()}


async def recordings_queued(js: JetStreamContext) -> int:
    """The number of recordings that wait for their tokens or are being worked on.

    Raises the errors of nats-py: call it in `nats_errors`.
    """
    info = await js.stream_info(DEC, subjects_filter=ENC_SUBJECT)
    return len(info.state.subjects or ())


async def purge_job(js: JetStreamContext, job_id: str) -> None:
    """Delete a job's messages from both queues, whether waiting or being worked on. Raises `Unavailable`.

    They are deleted by sequence: after a purge by subject nats-server 2.15.1 may forget other messages that wait for an
    acknowledgement.
    """
    lanes = [(TOK, token_subject(lane, job_id)) for lane in TOK_CONSUMERS]
    lanes += [(DEC, decode_subject(job_id, lane)) for lane in DEC_CONSUMERS]
    lanes.append((DEC, encode_subject(job_id)))
    for stream, subject in lanes:
        with contextlib.suppress(NotFound), nats_errors("the queues cannot be purged"):  # never there
            message = await js.get_msg(stream, subject=subject)
            with contextlib.suppress(BadRequestError):  # gone meanwhile
                await js.delete_msg(stream, message.seq or 0)
