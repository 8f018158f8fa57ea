"""Putting songs into the two queues. A queue holds one message a song, so publishing again changes nothing.

Workers are told when the message is on disk: they would hear of the publication itself before it counts.
"""

import secrets

import msgspec
import nats
from nats.aio.client import Client
from nats.js.api import PubAck
from nats.js.errors import APIError

from shared.errors import QueueFull, Unavailable
from shared.messages import DecodeJob, Job, Role, TokenJob
from shared.topology import decode_subject, token_subject, work_subject

_STREAM_FULL = 10077


async def queue_tokens(nc: Client, job: Job) -> PubAck | None:
    """Let a song wait for its tokens. None when it does already.

    Raises `QueueFull`, or `Unavailable` when NATS did not say that it has the message (it may have it).
    """
    order = TokenJob(job_id=job.job_id, tenant=job.tenant)
    return await _publish(nc, "tokenizer", token_subject(job.request.priority, job.job_id), order)


async def queue_decode(nc: Client, job: Job, tokens_key: str, frames: int) -> PubAck | None:
    """Let a song, whose tokens are all stored under `tokens_key`, wait for its audio. Otherwise as `queue_tokens`."""
    order = DecodeJob(
        job_id=job.job_id, tenant=job.tenant, tokens_key=tokens_key, first_frame=0, frames=frames, last=True
    )
    return await _publish(nc, "codec", decode_subject(job.job_id), order)


async def _publish(nc: Client, role: Role, subject: str, order: TokenJob | DecodeJob) -> PubAck | None:
    # An id of its own: a song may come into the same queue again, within the window in which the server drops
    # repetitions of an id.
    headers = {"Nats-Msg-Id": f"{order.job_id}:{secrets.token_hex(4)}"}
    try:
        ack = await nc.jetstream().publish(subject, msgspec.json.encode(order), headers=headers)
        await nc.publish(work_subject(role))
        return ack
    except APIError as error:
        if error.err_code != _STREAM_FULL:
            raise Unavailable("nats", f"NATS did not take the song: {error.description}") from error
        if "per subject" in (error.description or ""):
            return None
        raise QueueFull("as many songs wait as may; try again in a while") from None
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise Unavailable("nats", f"NATS does not answer: {str(error) or type(error).__name__}") from error
