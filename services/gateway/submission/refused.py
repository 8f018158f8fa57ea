"""The event that a request from the intake was refused, for clients that no longer wait for an answer."""

from typing import Annotated

import msgspec
from msgspec import Meta

from services.gateway.errors import Problem
from shared.schema.event import Envelope


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused", tag_field="kind"):
    """The request will not become a song, and has left the intake."""

    job_id: Annotated[str, Meta(description="that the song would have had")]
    key: Annotated[str, Meta(description="the Nats-Msg-Id of the request, or one that the gateway made up")]
    problem: Problem


class RefusedEvent(Envelope, frozen=True, kw_only=True):
    """The event of a request that was refused. It is about no song, so HTTP clients do not get it."""

    data: Refused
