"""What the decoder's process is given, and what it answers: one JSON object each."""

from typing import Annotated, Literal

import msgspec

from shared.errors import RefusalReason
from shared.schema.request import AudioFormat

_Positive = Annotated[int, msgspec.Meta(gt=0)]


class DecodingLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one recording may take."""

    seconds: float = 600.0  # of audio
    most_channels: int = 2
    lowest_rate: int = 8000  # Hz
    highest_rate: int = 192_000  # Hz
    output_bytes: int = 400_000_000  # of the FLAC that is made; ten minutes at 48 kHz and 24 bits take 173 MB at most
    address_space: int = 512 * 2**20  # bytes of the process; 110 MB are taken before it begins
    cpu_seconds: int = 180
    wall_seconds: float = 600.0  # from the start of the process to its end


class Decoded(msgspec.Struct, frozen=True, kw_only=True, tag="decoded", forbid_unknown_fields=True):
    """What was found in a recording; its audio is in a FLAC file with as many channels and the same sample rate."""

    audio_format: AudioFormat  # of the upload
    sample_rate: _Positive  # Hz
    channels: _Positive
    frames: _Positive  # samples a channel
    bits: Literal[16, 24]  # a sample of the FLAC file

    @property
    def seconds(self) -> float:
        """How long it plays."""
        return self.frames / self.sample_rate


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """Why a recording cannot be used, in words for the user."""

    reason: RefusalReason
    message: str


class DiskFull(msgspec.Struct, frozen=True, kw_only=True, tag="disk-full"):
    """The FLAC file could not be written, which is not the recording's fault."""

    error: str


Report = Decoded | Refusal | DiskFull
