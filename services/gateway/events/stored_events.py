"""Reading stored events from the EVENTS stream, one at a time and from the stream's leader."""

import logging
from dataclasses import dataclass, field

from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from shared.errors import NotFound, Unreadable
from shared.nats.errors import nats_errors
from shared.nats.subjects import EVENTS
from shared.schema.decoding import read_event
from shared.schema.event import CloudEvent
from shared.schema.job import Status

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """An event as it is sent to a client."""

    id: str  # sequence of the latest event that the client knows then
    type: str  # "snapshot", or the type of the event
    data: str  # JSON


@dataclass(frozen=True)
class StoredEvent:
    """An event and its place in the stream."""

    sequence: int
    event: CloudEvent
    # As sent, by progress, state and whether live.
    frames: dict[tuple[float, Status, bool], Frame] = field(default_factory=dict)


def stored_event(sequence: int, subject: str, data: bytes | None) -> StoredEvent | None:
    """Decode an event; None for one that this version cannot read, or that is about no song."""
    if subject.endswith(".refused"):  # about a request from the intake; NATS clients alone get it
        return None
    try:
        return StoredEvent(sequence, read_event(subject, data))
    except Unreadable as error:
        log.warning("event %d cannot be read: %s", sequence, error)
        return None


async def newest(js: JetStreamContext, subject: str) -> StoredEvent | None:
    """The latest event on a subject, which may hold wildcards; None when there is none. Raises `Unavailable`."""
    message = await _message(js, subject)
    return stored_event(message.seq or 0, message.subject or "", message.data) if message else None


async def last_sequence(js: JetStreamContext, subject: str) -> int:
    """The sequence of the latest event on a subject, readable or not; 0 when there is none. Raises `Unavailable`."""
    message = await _message(js, subject)
    return (message.seq or 0) if message else 0


async def following(js: JetStreamContext, subject: str, sequence: int) -> StoredEvent | None:
    """The first readable event on a subject from `sequence` on; None when there is none. Raises `Unavailable`."""
    while (message := await _message(js, subject, sequence)) is not None:
        sequence = message.seq or 0
        if stored := stored_event(sequence, message.subject or "", message.data):
            return stored
        sequence += 1
    return None


async def _message(js: JetStreamContext, subject: str, sequence: int | None = None) -> RawStreamMsg | None:
    try:
        with nats_errors("events cannot be read"):
            return await js.get_msg(EVENTS, seq=sequence, subject=subject, next=sequence is not None)
    except NotFound:
        return None
