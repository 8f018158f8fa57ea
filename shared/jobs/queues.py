"""Puts songs and recordings into the queues.

A queue holds one message a song and lane, so publishing again changes nothing.

A message has its record's schema: a worker that cannot read the one leaves the other, too, to a newer worker.

Workers are notified when the message is on disk: they would hear of the publication itself before it counts.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
from nats.aio.client import Client
from nats.js.api import PubAck
from nats.js.errors import APIError

from shared.errors import QueueFull, StreamFull, Unavailable
from shared.nats.errors import nats_errors
from shared.nats.subjects import decode_subject, encode_subject, token_subject, work_subject
from shared.schema.base import UNFINISHED_SCHEMA
from shared.schema.job import DecodeJob, Job, TokenJob
from shared.schema.request import Priority
from shared.schema.worker import Role
from shared.tracing import trace_headers
from shared.write_failures import write_failed


async def queue_tokens(nc: Client, job: Job) -> PubAck | None:
    """Queue a song for its tokens. None when it waits already.

    Raises `QueueFull`, or `Unavailable` when NATS did not say that it has the message (it may have it).
    """
    lane = job.request.priority
    order = _token_job(job)
    return await _publish(nc, "tokenizer", token_subject(lane, job.job_id), order, lane)


async def queue_recording(nc: Client, job: Job) -> PubAck | None:
    """Queue a recording for its tokens. Otherwise as `queue_tokens`."""
    return await _publish(nc, "encoder", encode_subject(job.job_id), _token_job(job), "normal")


async def queue_group(nc: Client, jobs: Sequence[Job]) -> list[int] | None:
    """Queue songs for their tokens in one atomic batch, all or none; returns the sequences of their messages.

    None when one of them waits already. Otherwise as `queue_tokens`. Batches: ADR-50 of NATS.
    """
    batch, ack = secrets.token_hex(16), b""
    try:
        with _queue_errors():
            for number, job in enumerate(jobs, 1):
                subject = token_subject(job.request.priority, job.job_id)
                data = msgspec.json.encode(_token_job(job))
                headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)} | trace_headers()
                if number < len(jobs):
                    await nc.publish(subject, data, headers=headers)
                else:
                    headers["Nats-Batch-Commit"] = "1"
                    ack = (await nc.request(subject, data, headers=headers, timeout=5)).data
            answer = json.loads(ack)
            if "error" in answer:
                raise APIError(**answer["error"])
            await nc.publish(work_subject("tokenizer"))
    except _Waiting:
        return None
    return [int(answer["seq"]) - len(jobs) + number for number in range(1, len(jobs) + 1)]


async def queue_decode(
    nc: Client, job: Job, tokens_key: str, frames: int, *, last: bool = True, listened: bool = False
) -> PubAck | None:
    """Queue a song for its audio; its tokens, all of them if `last`, are stored under `tokens_key`.

    A song that is `listened` to is queued in the lane that goes first. Otherwise as `queue_tokens`.
    """
    order = DecodeJob(
        schema=job.schema if last else max(job.schema, UNFINISHED_SCHEMA),
        job_id=job.job_id,
        tenant=job.tenant,
        tokens_key=tokens_key,
        first_frame=0,
        frames=frames,
        last=last,
    )
    lane: Priority = "high" if listened else "normal"
    return await _publish(nc, "codec", decode_subject(job.job_id, lane), order, lane)


async def queue_windows(nc: Client, job: Job, *, listened: bool = False) -> PubAck | None:
    """Queue a song for the audio of what its record says is there. None also where it says that nothing is.

    Otherwise as `queue_tokens`.
    """
    if job.tokens_key is None:
        return None
    if job.status == "decoding" and job.frames:
        return await queue_decode(nc, job, job.tokens_key, job.frames, listened=listened)
    if job.status == "generating" and job.saved_frames:
        return await queue_decode(nc, job, job.tokens_key, job.saved_frames, last=False, listened=listened)
    return None


def _token_job(job: Job) -> TokenJob:
    return TokenJob(schema=job.schema, job_id=job.job_id, tenant=job.tenant)


async def _publish(nc: Client, role: Role, subject: str, order: TokenJob | DecodeJob, lane: Priority) -> PubAck | None:
    # An id of its own: a song may come into the same queue again, within the window in which the server drops
    # repetitions of an id.
    headers = {"Nats-Msg-Id": f"{order.job_id}:{secrets.token_hex(4)}"} | trace_headers()
    try:
        with _queue_errors():
            ack = await nc.jetstream().publish(subject, msgspec.json.encode(order), headers=headers)
            await nc.publish(work_subject(role), lane.encode())
    except _Waiting:
        return None
    return ack


class _Waiting(Exception):
    """The song waits already."""


@contextmanager
def _queue_errors() -> Iterator[None]:
    """Map the errors of a publication. Raises `_Waiting`, `QueueFull` or `Unavailable`."""
    try:
        with nats_errors("NATS does not answer", refusal="NATS did not take the song"):
            yield
    except StreamFull as full:
        if full.subject_only:
            raise _Waiting from None
        raise QueueFull("as many songs wait as may; try again in a while") from None
    except Unavailable:
        write_failed("nats")
        raise
