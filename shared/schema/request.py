"""A request for a song, as users send it. An unknown field is an error."""

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Priority = Literal["high", "normal"]
AudioFormat = Literal["flac", "wav", "mp3", "ogg"]
WebhookEvent = Literal["ended", "audio"]
DEFAULT_DURATION_MS = 120_000
DEFAULT_MIN_NEW_MS = 10_000
MAX_DURATION_MS = 3_600_000
MAX_BODY = 256 * 1024  # bytes of a request
MAX_DAYS_AHEAD = 6  # of `not_before`: records are kept for a week, without a gateway too
MAX_SEED = 2**53 - 1  # what JSON carries exactly everywhere


class ContinueFrom(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a song goes on from: a song of the same tenant, or a recording. One of both."""

    job_id: Annotated[str, Meta(max_length=64, description="a completed song")] | None = None
    recording_id: Annotated[str, Meta(max_length=64, description="a recording that is ready")] | None = None
    at_ms: (
        Annotated[
            int,
            Meta(ge=80, le=MAX_DURATION_MS, description="how much of it to keep; 80 ms make a frame; all if absent"),
        ]
        | None
    ) = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a user asks for. Limits that depend on the model are checked by the gateway at submission."""

    lyrics: Annotated[str, Meta(max_length=60_000, description="the words, with [Verse], [Chorus] … lines")]
    tags: Annotated[str, Meta(max_length=4_000, description="style, divided by commas: pop,piano,english")] = ""
    max_duration_ms: (
        Annotated[int, Meta(ge=80, le=MAX_DURATION_MS, description="longest song wanted; 80 ms make a frame")] | None
    ) = None
    temperature: Annotated[float, Meta(ge=0, le=5, description="0 always takes the likeliest token")] = 1.0
    cfg_scale: Annotated[float, Meta(ge=0, le=20, description="guidance; 1 switches it off and is faster")] = 1.5
    topk: Annotated[int, Meta(ge=1, le=100_000, description="sample among the k likeliest tokens")] = 50
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED, description="same seed, same song; random if absent")] | None = None
    format: AudioFormat = "flac"
    title: Annotated[str, Meta(max_length=300)] | None = None
    priority: Priority = "normal"
    webhook_url: Annotated[str, Meta(max_length=2_000, description="called when the song has ended")] | None = None
    webhook_events: Annotated[
        tuple[WebhookEvent, ...],
        Meta(min_length=1, max_length=2, description="when to call it: at the song's end, at its first audio"),
    ] = ("ended",)
    continue_from: Annotated[ContinueFrom, Meta(description="begin with another song, up to a moment of it")] | None = (
        None
    )
    min_new_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_DURATION_MS,
            description="with continue_from: the model cannot end the song before so much is new",
        ),
    ] = DEFAULT_MIN_NEW_MS
    variants: Annotated[int, Meta(ge=1, le=4, description="songs to make of it, with seeds in a row")] = 1
    instrumental: Annotated[
        bool, Meta(description="a song without words: lyrics are empty, or hold section marks alone")
    ] = False
    not_before: (
        Annotated[
            datetime,
            Meta(tz=True, description=f"queue it at this time, at most {MAX_DAYS_AHEAD} days ahead; RFC 3339"),
        ]
        | None
    ) = None
