"""What gateways say of listeners to songs that are being made."""

import msgspec

from shared.schema.base import SCHEMA


class Listening(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody listens to a song through a gateway; said every few seconds, stored nowhere."""

    schema: int = SCHEMA
    job_id: str
    gateway: str  # which one says so
    listeners: int  # at least 1
    buffered: float  # seconds that the listener furthest along can go on to play without more audio; 0 before the first
