"""Reads all job records once, from beginning to end.

By a pull consumer, in batches: the reader takes its time over each record, and the ordered consumer, which is pushed
to, would bring the whole bucket into memory meanwhile.
"""

import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from shared.errors import NotFound, Unavailable, Unreadable
from shared.nats.errors import nats_errors
from shared.nats.subjects import JOBS
from shared.schema.decoding import read_record
from shared.schema.job import Job

log = logging.getLogger(__name__)

_STREAM = f"KV_{JOBS}"
_BATCH = 50  # a record holds up to 64 KiB of lyrics and tags
_FETCH_SECONDS = 5.0
_FAILURE = "job records cannot be read"


@dataclass(frozen=True)
class Record:
    """A record as it was when it was read."""

    job_id: str
    job: Job | None  # None where this version cannot read it
    written: float  # seconds since the epoch, by the server's clock


async def scan(js: JetStreamContext) -> AsyncGenerator[Record, None]:
    """Every record that there is now; one that changes meanwhile may come twice, or in its new form only.

    Raises `Unavailable`, or `NotFound` where there is no bucket. Close the iterator when leaving early.
    """
    with nats_errors(_FAILURE):
        info = await js.add_consumer(
            _STREAM,
            ConsumerConfig(
                filter_subject=f"$KV.{JOBS}.>",
                deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
                ack_policy=AckPolicy.NONE,
                inactive_threshold=300.0,
                mem_storage=True,
                num_replicas=1,
            ),
        )
        subscription = await js.pull_subscribe_bind(info.name, _STREAM)
    try:
        left = info.num_pending or 0
        while left > 0:
            with nats_errors(_FAILURE):
                messages = await subscription.fetch(min(_BATCH, left), timeout=_FETCH_SECONDS)
            # What is written meanwhile is not waited for, or a busy bucket would have no end.
            left = min(left - len(messages), messages[-1].metadata.num_pending or 0)
            for message in messages:
                if message.data:  # else a delete marker
                    yield _read(message)
    finally:
        with contextlib.suppress(Unavailable, NotFound), nats_errors("the consumer cannot be deleted"):
            await subscription.unsubscribe()
            await js.delete_consumer(_STREAM, info.name)


def _read(message: Msg) -> Record:
    job_id, written = message.subject.rpartition(".")[2], message.metadata.timestamp.timestamp()
    try:
        return Record(job_id, read_record(message.subject, message.data), written)
    except Unreadable as error:
        log.warning("the record of %s cannot be read: %s", job_id, error)
        return Record(job_id, None, written)
