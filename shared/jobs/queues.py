"""Putting songs into the two queues. A queue holds one message a song, so publishing again changes nothing.

Workers are told when the message is on disk: they would hear of the publication itself before it counts.
"""

import json
import secrets
from collections.abc import Sequence

import msgspec
import nats
from nats.aio.client import Client
from nats.js.api import PubAck
from nats.js.errors import APIError

from shared.causes import why
from shared.errors import QueueFull, Unavailable
from shared.nats.subjects import decode_subject, token_subject, work_subject
from shared.schema.job import DecodeJob, Job, TokenJob
from shared.schema.worker import Role
from shared.tracing import conv_cache
from shared.write_failures import write_failed

_STREAM_FULL = 10077


async def queue_tokens(nc: Client, job: Job) -> PubAck | None:
    """Let a song wait for its tokens. None when it does already.

    Raises `QueueFull`, or `Unavailable` when NATS did not say that it has the message (it may have it).
    """
    order = TokenJob(job_id=job.job_id, tenant=job.tenant)
    return await _publish(nc, "tokenizer", token_subject(job.request.priority, job.job_id), order)


async def queue_group(nc: Client, jobs: Sequence[Job]) -> list[int] | None:
    """Let songs wait for their tokens, all or none of them; returns the sequences of their messages.

    None when one of them waits already. Otherwise as `queue_tokens`. In one atomic batch (ADR-50 of NATS).
    """
    batch, ack = secrets.token_hex(16), b""
    try:
        for number, job in enumerate(jobs, 1):
            subject = token_subject(job.request.priority, job.job_id)
            data = msgspec.json.encode(TokenJob(job_id=job.job_id, tenant=job.tenant))
            headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)} | conv_cache()
            if number < len(jobs):
                await nc.publish(subject, data, headers=headers)
            else:
                ack = (await nc.request(subject, data, headers=headers | {"Nats-Batch-Commit": "1"}, timeout=5)).data
        answer = json.loads(ack)
        if "error" in answer:
            _require_waiting(APIError(**answer["error"]))
            return None
        await nc.publish(work_subject("tokenizer"))
        return [int(answer["seq"]) - len(jobs) + number for number in range(1, len(jobs) + 1)]
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise _silent(error) from error


async def queue_decode(nc: Client, job: Job, tokens_key: str, frames: int) -> PubAck | None:
    """Let a song, whose tokens are all stored under `tokens_key`, wait for its audio. Otherwise as `queue_tokens`."""
    order = DecodeJob(
        job_id=job.job_id, tenant=job.tenant, tokens_key=tokens_key, first_frame=0, frames=frames, last=True
    )
    return await _publish(nc, "codec", decode_subject(job.job_id), order)


async def _publish(nc: Client, role: Role, subject: str, order: TokenJob | DecodeJob) -> PubAck | None:
    # An id of its own: a song may come into the same queue again, within the window in which the server drops
    # repetitions of an id.
    headers = {"Nats-Msg-Id": f"{order.job_id}:{secrets.token_hex(4)}"} | conv_cache()
    try:
        ack = await nc.jetstream().publish(subject, msgspec.json.encode(order), headers=headers)
        await nc.publish(work_subject(role))
        return ack
    except APIError as error:
        _require_waiting(error)
        return None
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise _silent(error) from error


def _require_waiting(error: APIError) -> None:
    """Raise, unless the message was refused because the song waits already."""
    if error.err_code != _STREAM_FULL:
        write_failed("nats")
        raise Unavailable("nats", f"NATS did not take the song: {error.description}") from error
    if "per subject" not in (error.description or ""):
        raise QueueFull("as many songs wait as may; try again in a while") from None


def _silent(error: Exception) -> Unavailable:
    write_failed("nats")
    return Unavailable("nats", f"NATS does not answer: {why(error)}")
