"""All errors that this project raises on purpose, as a tree. Control-flow signals are no errors and stand elsewhere.

::

    HeartMulaError
    ├── ConfigError         an environment variable or checkpoint folder is wrong; the message names it
    ├── InvalidRequest      a request that the user has to change; carries the field
    ├── RecordingRefused    an upload that cannot be used; carries the reason
    ├── QueueFull           the queue holds as many songs as it may; try again later
    ├── Unavailable         NATS, the object store, … does not answer, or not as needed:
    │   ├── Rejected        … it refuses this process; waiting does not help
    │   ├── NoRoom          … it has no room for more
    │   └── Refused         … JetStream answers with a refusal
    │       └── StreamFull  … a stream or a subject holds as many messages as it may
    ├── NotFound            a message, stream or consumer is not there
    ├── WrongSequence       a compare-and-set met another write
    ├── JobConflict         the job record is no longer in the state that an operation needs
    │   └── NewerRecord     … or cannot be read, mostly because a newer version wrote it
    ├── Unreadable          data in NATS is not what it should be, or a newer version wrote it
    ├── ObjectError         an object is missing or its checksum does not match
    │   └── TokensLost      … and it holds the tokens of a song, which can be made again
    ├── DeviceFull          weights or a cache do not fit the device
    ├── DeviceBroken        the device's driver gave this process up; only a new process can use it
    ├── PhaseError          work was attempted outside its offload phase
    │   └── LeaseLost       … because the lease on the device is lost
    └── SongError           this song cannot be made; retrying does not help
"""

from typing import Literal

RefusalReason = Literal[
    "too-large",  # more bytes than allowed
    "too-slow",  # bytes came slower than allowed
    "malformed",  # the request's body is a broken form
    "unknown-format",  # neither FLAC nor WAV, MP3 or Ogg
    "unsupported",  # one of them, of a kind that is not taken
    "empty",  # no sample in it
    "too-short",  # fewer seconds of audio than a recording must have
    "damaged",
    "too-long",  # more seconds of audio than allowed
    "too-costly",  # decoding takes more time or memory than allowed, or makes more bytes
]


class HeartMulaError(Exception):
    """Base of every error raised on purpose. Its message is fit to be shown to a user."""


class ConfigError(HeartMulaError):
    """A setting or a checkpoint folder cannot be used."""


class InvalidRequest(HeartMulaError):
    """A request that can never succeed as it stands.

    `field` names the request's field, or is empty when the whole request is meant.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class RecordingRefused(HeartMulaError):
    """An upload that cannot be used as it stands."""

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class QueueFull(HeartMulaError):
    """The queue holds as many songs as it may."""


class Unavailable(HeartMulaError):
    """A server that is needed does not answer. `service` is "nats" or "s3"; "decoder" or "disk" for recordings."""

    def __init__(self, service: str, message: str) -> None:
        super().__init__(message)
        self.service = service


class Rejected(Unavailable):
    """A server refuses this process. Waiting does not help; a setting has to be changed."""


class NoRoom(Unavailable):
    """A server has no room for more. Waiting for some seconds does not help."""


class Refused(Unavailable):
    """JetStream answered and refused a request."""


class StreamFull(Refused):
    """A stream of JetStream takes no further message. `subject_only`: on this subject; others still have room."""

    def __init__(self, service: str, message: str, *, subject_only: bool = False) -> None:
        super().__init__(service, message)
        self.subject_only = subject_only


class NotFound(HeartMulaError):
    """A message, stream or consumer is not there."""


class WrongSequence(HeartMulaError):
    """A compare-and-set met another write: the sequence that was expected is no longer the latest."""


class JobConflict(HeartMulaError):
    """A job record is not in the state that an operation needs."""


class NewerRecord(JobConflict):
    """A job record cannot be understood by this version: a newer one wrote it, or it is no record."""


class Unreadable(HeartMulaError):
    """Something in NATS cannot be read. `newer`: a newer version wrote it, which can."""

    def __init__(self, message: str, *, newer: bool = False) -> None:
        super().__init__(message)
        self.newer = newer


class ObjectError(HeartMulaError):
    """A stored object is missing, truncated or does not match its checksum."""


class TokensLost(ObjectError):
    """The tokens of a song are missing or damaged; they can be made again."""


class DeviceFull(HeartMulaError):
    """An allocation does not fit the device."""


class DeviceBroken(HeartMulaError):
    """Every further use of the device by this process fails, as after an illegal memory access."""


class PhaseError(HeartMulaError):
    """Weights were moved, or a step was run, outside the phase that allows it."""


class LeaseLost(PhaseError):
    """The lease on the device is no longer held. Nothing more may run on it."""


class SongError(HeartMulaError):
    """A song that cannot be made, however often it is tried."""
