"""A song's FLAC stream, made window by window, and all that another process needs to go on with it."""

from dataclasses import dataclass

import numpy as np

from services.codec_worker.checked_arrays import CheckedArrays
from services.codec_worker.engines.decode_state import DecodeState
from shared.audio.flac import BLOCK, encode_blocks
from shared.audio.pcm import pcm16
from shared.audio.peaks import Peaks
from shared.errors import ObjectError

_WHAT = "the saved state of decoding"
_PEAKS = "peaks."  # begins the names of the arrays of `Peaks.pack`


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedDecode:
    """Where a song stands after a window: the engine's state, and that of the stream which its audio goes into."""

    engine: str  # identity of the engine that decoded it
    state: DecodeState
    header: bytes  # of the stream
    rest: np.ndarray  # int16 [samples, 2], handed out by the engine, that do not fill a FLAC block yet
    peaks: Peaks  # of everything so far

    def pack(self) -> bytes:
        """Serialise it; `unpack` gives it back to the last bit."""
        arrays = {
            "state": np.frombuffer(self.state.pack(), np.uint8),
            "header": np.frombuffer(self.header, np.uint8),
            "rest": self.rest,
            **{_PEAKS + name: array for name, array in self.peaks.pack().items()},
        }
        return CheckedArrays(arrays, {"engine": self.engine}).pack()

    @classmethod
    def unpack(cls, data: bytes) -> "SavedDecode":
        """Read it back. Raises `ObjectError` when it is damaged."""
        found = CheckedArrays.unpack(data, _WHAT)
        arrays = found.arrays
        try:
            return cls(
                engine=found.metadata["engine"],
                state=DecodeState.unpack(arrays["state"].tobytes()),
                header=arrays["header"].tobytes(),
                rest=arrays["rest"],
                peaks=Peaks.unpack(
                    {name.removeprefix(_PEAKS): array for name, array in arrays.items() if name.startswith(_PEAKS)}
                ),
            )
        except KeyError as error:
            raise ObjectError(f"{_WHAT} is not of this version: {error}") from error


@dataclass(frozen=True)
class Piece:
    """The next piece of a stream."""

    frames: bytes  # FLAC frames
    pcm: np.ndarray  # int16 [samples, 2] that they hold


class SongStream:
    """Turns audio into pieces of FLAC whose frames are those of a whole encode. One call at a time, from any thread."""

    def __init__(self, saved: SavedDecode, sample_rate: int) -> None:
        """Go on from what was saved; a `SavedDecode` of a new `DecodeState` begins the song."""
        self.header, self._engine, self._sample_rate = saved.header, saved.engine, sample_rate
        self._rest, self._peaks = saved.rest, saved.peaks
        self._blocks = (saved.state.samples - len(saved.rest)) // BLOCK  # in the stream so far

    def add(self, audio: np.ndarray, *, last: bool = False, encode: bool = True) -> Piece:
        """Add a window's audio, float32 ``[samples, 2]``; returns the piece of the stream that is whole by now.

        The `last` one of a song is whole to its last sample. Its frames are left out unless it is to be encoded.
        Raises `SongError` for audio that is not finite.
        """
        pcm = pcm16(audio)
        self._peaks.add(pcm)
        pcm = np.concatenate([self._rest, pcm])
        blocks = len(pcm) // BLOCK
        whole, self._rest = np.split(pcm, [len(pcm) if last else blocks * BLOCK])
        first, self._blocks = self._blocks, self._blocks + blocks
        return Piece(encode_blocks(whole, first, self._sample_rate) if encode else b"", whole)

    def save(self, state: DecodeState) -> bytes:
        """What another process needs to go on from here, where the engine is in `state`: a packed `SavedDecode`."""
        return SavedDecode(
            engine=self._engine, state=state, header=self.header, rest=self._rest, peaks=self._peaks
        ).pack()

    def peaks(self) -> bytes:
        """The peaks of everything so far, as they are stored."""
        return self._peaks.json()
