"""The interfaces of engines: a codec, token frames in, audio out; and an encoder, the other way round.

An engine knows nothing of NATS, S3 or HTTP.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from services.codec_worker.engines.decode_state import DecodeState
from services.codec_worker.engines.kept_windows import NOTHING_KEPT, KeptWindows

__all__ = [
    "NOTHING_KEPT",
    "CodecEngine",
    "DecodeState",
    "DecodeStep",
    "DecodeSteps",
    "EncodeStep",
    "EncodeSteps",
    "EncoderEngine",
    "KeptWindows",
]


@dataclass(frozen=True)
class DecodeStep:
    """The result of one step."""

    done: int  # steps finished, this one included
    total: int  # steps that this call takes
    audio: np.ndarray | None = None  # float32 [samples, 2], the next stretch of the song that is final
    state: DecodeState | None = None  # with the last step of a window that another may follow
    window_left: int = 0  # steps that the window in work still takes


DecodeSteps: TypeAlias = Generator[DecodeStep, None, None]
"""Steps of decoding, each computed by its ``next()``. Closing it, or its end, gives the device's work memory back."""


@dataclass(frozen=True)
class EncodeStep:
    """The result of one step of encoding a recording."""

    done: int  # steps finished, this one included
    total: int  # steps that this call takes
    codes: np.ndarray | None = None  # int16 [8, frames], with the last step of some chunks: theirs


EncodeSteps: TypeAlias = Generator[EncodeStep, None, None]
"""Steps of encoding, each computed by its ``next()``. Closing it, or its end, gives the device's work memory back."""


class CodecEngine(Protocol):
    """An engine that makes audio from token frames. Its methods block: call them in a thread of their own."""

    sample_rate: int  # Hz

    @property
    def identity(self) -> str:
        """What the audio follows from beside codes and seed: the weights, and each setting that can be heard.

        A song that another engine began to decode is begun again. Raises `OSError` when the checkpoint is gone.
        """

    @property
    def notes(self) -> Sequence[str]:
        """What it does without on this machine, a line for people each, as "no C compiler: …"; mostly none."""

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take on the device."""

    @property
    def work_bytes(self) -> int:
        """Upper estimate of the bytes that a decode needs on the device beside the weights."""

    def load(self) -> None:
        """Read the weights into host memory. Raises `ConfigError` when the checkpoint does not fit the layout."""

    def to_device(self) -> None:
        """Move the weights to the device."""

    def to_host(self) -> None:
        """Move the weights to host memory and give the device's memory back."""

    def decode(self, codes: np.ndarray, *, seed: int) -> DecodeSteps:
        """Decode int16 codes ``[8, L]``; every ``next()`` runs one Euler step or one stretch of the waveform decoder.

        The audio of all steps together has ``floor(L · 2 / 25 · sample_rate)`` samples a channel.
        """

    def advance(
        self, state: DecodeState, codes: np.ndarray, *, ended: bool, kept: KeptWindows = NOTHING_KEPT
    ) -> DecodeSteps:
        """Decode what `state` leaves of a song, as far as it is final.

        `codes` are all codes of the song so far, int16 ``[8, T]``, from its first on; once the song has `ended`, all
        that it has. Audio is final when no further code can change it; an engine that cannot tell waits for the end.
        Together the calls give the samples of `decode`, to the last bit, wherever the codes were cut: `state` is that
        of the last step which had one, in this process or another with the same settings, and audio that came after
        it is made again.

        `kept` is what the song takes over from the one that it goes on from, the same in all calls: its audio is that
        of the other song up to where they part. An engine that decodes songs as wholes does not use it.
        """


class EncoderEngine(Protocol):
    """An engine that makes token frames from audio. Its methods block: call them in a thread of their own."""

    @property
    def identity(self) -> str:
        """What codes follow from beside the recording. Raises `OSError` when the checkpoint is gone."""

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take on the device."""

    @property
    def work_bytes(self) -> int:
        """Upper estimate of the bytes that encoding needs on the device beside the weights."""

    def load(self) -> None:
        """Read the weights into host memory. Raises `ConfigError` when the checkpoint does not fit the layout."""

    def to_device(self) -> None:
        """Move the weights to the device."""

    def to_host(self) -> None:
        """Move the weights off the device and give its memory back."""

    def encode(self, audio: np.ndarray, sample_rate: int, *, first: int = 0) -> EncodeSteps:
        """Encode ``audio``, float32 ``[1 or 2, samples]`` at `sample_rate` Hz, from its chunk `first` on.

        Chunks and frames are those of `services.codec_worker.encoder.chunks`, and final as they come: another engine of
        this `identity` may go on after any chunk. An array that is mapped from a file is never in memory as a whole.
        """
