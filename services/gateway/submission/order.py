"""An order: a validated request for songs, and the records that are made of it."""

import time
from dataclasses import dataclass, field

import msgspec

from services.gateway.auth.api_keys import Caller
from services.gateway.submission.continuing import Continuation
from shared.schema.base import CONTINUED_SCHEMA, DEFERRED_SCHEMA, SCHEMA
from shared.schema.job import Job
from shared.schema.request import DEFAULT_MIN_NEW_MS, GenerateRequest

# What of a request a record says elsewhere; see `Job.request`.
_ELSEWHERE = {
    "variants": 1,
    "webhook_events": GenerateRequest(lyrics="").webhook_events,
    "continue_from": None,
    "min_new_ms": DEFAULT_MIN_NEW_MS,
    "instrumental": False,
    "not_before": None,
}


@dataclass
class Order:
    """A validated request for songs, and the state of its steps."""

    caller: Caller
    asked: GenerateRequest
    ids: list[str]  # of its songs
    digest: str | None = None  # of the request, where it has a key
    continuation: Continuation | None = None  # what its songs take over from another one
    completed: GenerateRequest | None = None  # with every field filled in
    counted: int = 0  # songs that were counted against the caller's quota
    created: dict[str, Job] = field(default_factory=dict)  # records that this request created, or may have created


def is_deferred(asked: GenerateRequest) -> bool:
    """Whether the songs of a request are to wait for a time that has not come."""
    return asked.not_before is not None and asked.not_before.timestamp() > time.time()


def new_record(order: Order, index: int, request: GenerateRequest, seed: int) -> Job:
    """The record of one of the songs of an order, from its request with every field filled in."""
    asked, several = order.asked, len(order.ids) > 1
    parent = order.continuation.parent(request, asked.min_new_ms) if order.continuation else None
    deferred = is_deferred(asked)
    return Job(
        schema=DEFERRED_SCHEMA if deferred else SCHEMA if parent is None else CONTINUED_SCHEMA,
        job_id=order.ids[index],
        tenant=order.caller.tenant,
        request=msgspec.structs.replace(request, seed=seed, **_ELSEWHERE),
        instrumental=asked.instrumental,
        not_before=asked.not_before.timestamp() if deferred and asked.not_before else None,
        deferred=deferred,
        webhook_events=asked.webhook_events,
        tags_sent=asked.tags if asked.tags != request.tags else None,
        created_at=time.time(),
        group=order.ids[0] if several else None,
        variant=index + 1 if several else None,
        digest=order.digest,
        parent=parent,
    )
