"""Stored events, read from the EVENTS stream."""

import logging
from dataclasses import dataclass, field

import nats
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg
from nats.js.errors import APIError, NotFoundError

from shared.causes import why
from shared.errors import Unavailable, Unreadable
from shared.nats.subjects import EVENTS
from shared.schema.decoding import read_event
from shared.schema.event import CloudEvent

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """What a client is sent."""

    id: str  # sequence of the latest event that it knows then
    type: str  # "snapshot", or the type of the event
    data: str  # JSON


@dataclass(frozen=True)
class StoredEvent:
    """An event and its place in the stream."""

    sequence: int
    event: CloudEvent
    frames: dict[tuple[float, bool], Frame] = field(default_factory=dict)  # as sent, by progress and whether live


def stored_event(sequence: int, subject: str, data: bytes | None) -> StoredEvent | None:
    """An event as stored; None for one that cannot be read, by this version or at all."""
    try:
        return StoredEvent(sequence, read_event(subject, data))
    except Unreadable as error:
        log.warning("event %d cannot be read: %s", sequence, error)
        return None


async def newest(js: JetStreamContext, subject: str) -> StoredEvent | None:
    """The latest event on a subject, which may hold wildcards; from the leader. Raises `Unavailable`."""
    message = await _message(js, subject)
    return stored_event(message.seq or 0, message.subject or "", message.data) if message else None


async def last_sequence(js: JetStreamContext, subject: str) -> int:
    """The sequence of the latest event on a subject, readable or not; 0 when there is none. Otherwise as `newest`."""
    message = await _message(js, subject)
    return (message.seq or 0) if message else 0


async def following(js: JetStreamContext, subject: str, sequence: int) -> StoredEvent | None:
    """The first event on a subject from `sequence` on; from the leader. Raises `Unavailable`."""
    while (message := await _message(js, subject, sequence)) is not None:
        sequence = message.seq or 0
        if stored := stored_event(sequence, message.subject or "", message.data):
            return stored
        sequence += 1
    return None


async def _message(js: JetStreamContext, subject: str, sequence: int | None = None) -> RawStreamMsg | None:
    try:
        return await js.get_msg(EVENTS, seq=sequence, subject=subject, next=sequence is not None)
    except NotFoundError:
        return None
    except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
        raise Unavailable("nats", f"events cannot be read: {why(error)}") from error
