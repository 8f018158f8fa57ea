"""The record of a song or recording, and the messages that queue it.

Fields that a newer version may have added are ignored.
"""

from typing import Literal

import msgspec

from shared.frames import seconds_of
from shared.schema.base import SCHEMA, Seconds
from shared.schema.request import AudioFormat, GenerateRequest, Priority, WebhookEvent

Status = Literal["queued", "generating", "decoding", "completed", "failed", "cancelled"]
ENDED: frozenset[Status] = frozenset({"completed", "failed", "cancelled"})


class TokenJob(msgspec.Struct, frozen=True, kw_only=True):
    """A song or recording waits for its tokens. Everything else is in the job record."""

    schema: int = SCHEMA
    job_id: str
    tenant: str


class DecodeJob(msgspec.Struct, frozen=True, kw_only=True):
    """A song waits for its audio: for all of it, or for the windows whose tokens are whole.

    The record says how far tokens and audio are; the tokens named here are those that there were at the time.
    """

    schema: int = SCHEMA  # `UNFINISHED_SCHEMA` where it is not `last`
    job_id: str
    tenant: str
    tokens_key: str  # object key of int16 [8, frames]
    first_frame: int
    frames: int
    last: bool  # these are all tokens of the song


class AudioPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of the song's FLAC stream that is stored while the song is made; the first begins with the header."""

    key: str  # of the object
    size: int  # bytes
    samples: int  # a channel


class Decode(msgspec.Struct, frozen=True, kw_only=True):
    """The codec's stage of a song that has not ended: it may begin while tokens are still being made."""

    fencing_token: int | None = msgspec.field(default=None, name="fence")  # of the turn that decodes the song
    attempts: int = 0  # turns that began and neither saved anything nor gave the song back
    failures: int = 0  # of those, how many raised an error instead of dying with their worker
    lane: Priority | None = None  # of the message by which the song was claimed; it may wait in both
    sample_rate: int | None = None  # Hz; of the parts
    parts: tuple[AudioPart, ...] = ()  # what is decoded so far, a part a window

    @property
    def samples(self) -> int:
        """Samples a channel that can be heard."""
        return sum(part.samples for part in self.parts)


class AudioWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the webhook about a song's first audio, once it has been tried."""

    since: Seconds  # of the first attempt
    again: Seconds | None  # of the next attempt; None: it was delivered, or is given up
    calling: bool = False  # an attempt may be under way, until `again` at the latest


class Parent(msgspec.Struct, frozen=True, kw_only=True):
    """What a song begins with: the first frames of another song or of a recording."""

    job_id: str | None = None
    recording_id: str | None = None
    frames: int  # of it, with which this song begins, 80 ms each
    least_frames: int  # that this song has, kept ones included: the model cannot end it before
    # Of the codec's noise, a window each: windows that the kept frames fill sound as where they were first made.
    seeds: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """The id of the song or recording."""
        return self.job_id or self.recording_id or ""


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """What a user uploaded. Its audio is stored as FLAC before the record is."""

    sha256: str  # of the file as it came, hexadecimal
    upload_bytes: int  # of the file as it came
    upload_format: AudioFormat
    channels: int  # of the FLAC, as of the file


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a song, the only truth about its state. Changed by compare-and-set alone.

    A recording has one, too: it is a song of which the audio is there; while it is `generating`, the encoder makes its
    tokens. Its `request` says nothing but the title, and its seed, 0, is that of all songs which go on from it.
    """

    schema: int = SCHEMA
    job_id: str
    tenant: str
    # Of this song alone: max_duration_ms and seed filled in, tags tidied, one variant, without `webhook_events`,
    # `continue_from`, `min_new_ms`, `instrumental` and `not_before`: versions that do not know them could not read it.
    request: GenerateRequest
    instrumental: bool = False  # it was asked for without words; the request holds what the model reads for that
    not_before: Seconds | None = None  # when it is to be queued, or was, where that was later than it was accepted
    deferred: bool = False  # it waits for that time, in no queue; the record's schema is `DEFERRED_SCHEMA` then
    repeated: bool = False  # while it waits: its request came again and was answered, so that no rollback removes it
    tags_sent: str | None = None  # tags as they came, where tidying changed them
    status: Status = "queued"
    created_at: Seconds
    started_at: Seconds | None = None
    completed_at: Seconds | None = None  # when it ended, however it ended
    group: str | None = None  # id of the first of its variants, where several were asked for at once
    variant: int | None = None  # which of them it is, from 1
    digest: str | None = None  # of what was submitted, where a key makes submitting it again harmless
    webhook_events: tuple[WebhookEvent, ...] = ("ended",)
    audio_webhook: AudioWebhook | None = None
    parent: Parent | None = None  # the record's schema is `CONTINUED_SCHEMA` then
    recording: Recording | None = None  # None: a song; else the record's schema is `RECORDING_SCHEMA`
    fencing_token: int | None = msgspec.field(default=None, name="fence")  # of the turn that makes its tokens
    attempts: int = 0  # turns that began to make tokens and neither saved anything nor gave the song back
    failures: int = 0  # of those, how many raised an error instead of dying with their worker
    # Object key of its tokens; while they are made, of the latest checkpoint. It may name tokens that were not kept.
    tokens_key: str | None = None
    remade: int = 0  # how often its tokens were damaged or gone and had to be made again
    saved_frames: int | None = None  # at least so many are saved while they are made, 80 ms each
    frames: int | None = None  # all tokens of the song, 80 ms each
    decode: Decode | None = None
    first_part: str | None = None  # key of the part that its audio began with while it was made; kept when that is gone
    audio_key: str | None = None
    audio_bytes: int | None = None
    duration_s: float | None = None
    sample_rate: int | None = None
    error: str | None = None

    @property
    def edition(self) -> str | None:
        """Which stream of the song this is: the same one continues in the finished file. None before the first part.

        It changes where decoding begins again, with audio that may differ.
        """
        parts = self.decode.parts if self.decode is not None else ()
        return parts[0].key if parts else self.first_part

    @property
    def decoded_windows(self) -> int:
        """Windows of which the audio is stored, while the song is made."""
        return len(self.decode.parts) if self.decode is not None else 0

    @property
    def playable_seconds(self) -> float:
        """Seconds of the song, from its beginning, that can be heard."""
        if self.decode is not None and self.decode.sample_rate:
            return seconds_of(self.decode.samples, self.decode.sample_rate)
        return self.duration_s or 0.0
