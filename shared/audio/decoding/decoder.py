"""Decodes a recording to FLAC, in the process that `shared.audio.decoding.child_process` starts.

What a file's header says of its length is not believed: audio is decoded until there is no more, or more than
allowed. A file that ends early is a shorter recording, whether its header promised more (a copy that broke off) or
nothing (a stream that somebody kept): what is there is sound. A FLAC file with a gap or a wrong checksum before its
end is damaged: the music would jump. MP3 and Ogg decoders step over such gaps, as every player does, and say nothing.

Loudness stays as it came, mono stays mono, and so does the sample rate. 16 bits stay 16, and what was lossy is
rounded to 16, far below what the coding lost; other whole numbers and floats become 24. Louder than full scale is
clipped, as players clip it.
"""

import errno
import io
import os
from collections.abc import Iterator
from typing import Literal

import numpy as np
import soundfile

from shared.audio.decoding.messages import Decoded, DecodingLimits, DiskFull, Refusal, Report
from shared.audio.decoding.sniffing import sniff
from shared.audio.pcm import pcm16
from shared.audio.reading import SequentialFile
from shared.errors import RefusalReason
from shared.schema.request import AudioFormat

_BLOCK = 1024  # samples: of a FLAC that breaks off, as many are lost at most
_CONTAINERS: dict[AudioFormat, tuple[str, ...]] = {
    "flac": ("FLAC",),
    "wav": ("WAV", "WAVEX"),
    "mp3": ("MP3",),
    "ogg": ("OGG",),
}
_Dtype = Literal["int16", "int32", "float32"]
# libsndfile's names of codings: what to read them as, and the bits that FLAC needs for it.
_CODINGS: dict[str, tuple[_Dtype, Literal[16, 24]]] = {
    "PCM_U8": ("int16", 16),
    "PCM_S8": ("int16", 16),
    "PCM_16": ("int16", 16),
    "ULAW": ("int16", 16),
    "ALAW": ("int16", 16),
    "PCM_24": ("int32", 24),
    "PCM_32": ("int32", 24),
    "FLOAT": ("float32", 24),
    "DOUBLE": ("float32", 24),
    "VORBIS": ("float32", 16),
    "OPUS": ("float32", 16),
    "MPEG_LAYER_III": ("float32", 16),
}
_LOUDEST = (
    16.0  # of full scale, 24 dB: numbers beyond are on another scale, as when 16-bit values were stored as floats
)
_EVEN_RATES = 65_535  # Hz; FLAC's frame header says higher ones in tens (RFC 9639 §9.1.7)


class _RefusedError(Exception):
    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(reason=reason, message=message)


class _TargetError(Exception):
    """The FLAC file cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.errno = error.errno


class _EndlessFile(io.FileIO):
    """A file that seems to be longer than it is, to a decoder that derives the length of the audio from it.

    Of an MP3 with a varying bit rate that does not say its length (a stream that somebody kept) libsndfile would take
    the first frame's bit rate for that of all, and end too early.
    """

    _SIZE = 1 << 40  # bytes
    _at_end = False  # whether the decoder has just sought the end, to ask where that is

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at_end = whence == os.SEEK_END
        return self._SIZE + offset if self._at_end else super().seek(offset, whence)

    def tell(self) -> int:
        return self._SIZE if self._at_end else super().tell()


class _Target:
    """The FLAC file to libsndfile, which does not say why it could not write."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._error = self._error or error
            return 0
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return os.lseek(self._descriptor, offset, whence)

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)

    def check(self) -> None:
        """Raise `_TargetError` for the first error of writing."""
        if self._error is not None:
            raise _TargetError(self._error)


def decode(source: int, target: int, limits: DecodingLimits) -> Report:
    """Decode a file to FLAC; both are descriptors that can be sought in."""
    out = _Target(target)
    try:
        return _decode(source, out, limits)
    except _RefusedError as refused:
        return refused.refusal
    except MemoryError:
        return _too_costly("memory")
    except _TargetError as error:
        if error.errno == errno.EFBIG:
            return _too_costly("room on the disk")
        return DiskFull(error=str(error))


def _too_costly(what: str) -> Refusal:
    return Refusal(
        reason="too-costly", message=f"decoding this file takes more {what} than a recording may: upload less of it"
    )


def _decode(source: int, out: _Target, limits: DecodingLimits) -> Decoded:
    with io.FileIO(source, closefd=False) as uploaded:
        audio_format = sniff(uploaded)
        uploaded.seek(0)
    if audio_format is None:
        raise _RefusedError("unknown-format", "this is neither FLAC nor WAV, MP3 or Ogg; convert it to one of these")
    with _opened(source, audio_format) as file:
        _check(file, audio_format, limits)
        dtype, bits = _CODINGS[file.subtype]
        frames = 0
        with _flac(out, file, bits) as flac:
            for block in _blocks(file, source, dtype):
                frames += len(block)
                if frames > limits.seconds * file.samplerate:
                    raise _RefusedError("too-long", f"a recording may have at most {limits.seconds:g} seconds")
                _write(flac, _whole_numbers(block, bits), out)
        out.check()  # of what closing wrote
        if not frames:
            raise _RefusedError("empty", "there is no audio in this file")
        return Decoded(
            audio_format=audio_format, sample_rate=file.samplerate, channels=file.channels, frames=frames, bits=bits
        )


def _opened(source: int, audio_format: AudioFormat) -> SequentialFile:
    kind = _EndlessFile if audio_format == "mp3" else io.FileIO
    try:
        return SequentialFile(kind(source, closefd=False))
    except soundfile.SoundFileError:
        raise _damaged(f"its beginning says {audio_format}, but it cannot be read as such") from None


def _damaged(message: str) -> _RefusedError:
    return _RefusedError("damaged", f"the file is damaged: {message}")


def _check(file: SequentialFile, audio_format: AudioFormat, limits: DecodingLimits) -> None:
    """Refuse what the header says and cannot be used."""
    if file.format not in _CONTAINERS[audio_format] or file.subtype not in _CODINGS:
        raise _unsupported(f"its coding {file.format}/{file.subtype} is not taken")
    if not 1 <= file.channels <= limits.most_channels:
        raise _unsupported(f"it has {file.channels} channels, and a recording may have {limits.most_channels}")
    if not limits.lowest_rate <= file.samplerate <= limits.highest_rate:
        allowed = f"{limits.lowest_rate} to {limits.highest_rate} Hz"
        raise _unsupported(f"its sample rate is {file.samplerate} Hz, and a recording's may be {allowed}")
    if file.samplerate > _EVEN_RATES and file.samplerate % 10:
        raise _unsupported(
            f"its sample rate is {file.samplerate} Hz, and above {_EVEN_RATES} it must be a multiple of 10"
        )


def _unsupported(what: str) -> _RefusedError:
    return _RefusedError(
        "unsupported", f"{what}; convert it to 16-bit WAV or FLAC with 44100 Hz and one or two channels"
    )


def _flac(out: _Target, like: SequentialFile, bits: int) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(out, "w", like.samplerate, like.channels, f"PCM_{bits}", format="FLAC")
    except soundfile.SoundFileError:
        out.check()
        raise


def _write(flac: soundfile.SoundFile, block: np.ndarray, out: _Target) -> None:
    try:
        flac.write(block)
    except (soundfile.SoundFileError, AssertionError):  # soundfile asserts that all samples were taken
        out.check()
        raise
    out.check()


def _blocks(file: SequentialFile, source: int, dtype: _Dtype) -> Iterator[np.ndarray]:
    """What is there, `[samples, channels]`, but no more than the header promises."""
    left = file.frames
    while left > 0:
        try:
            block = file.read(min(_BLOCK, left), dtype, always_2d=True)
        except soundfile.SoundFileError:
            # It asked for more than there is, or met what is no audio; libFLAC reads 8 KiB at a time.
            if os.lseek(source, 0, os.SEEK_CUR) < os.fstat(source).st_size:
                raise _damaged("it cannot be decoded to its end") from None
            return
        if not len(block):
            return
        left -= len(block)
        yield block


def _whole_numbers(block: np.ndarray, bits: int) -> np.ndarray:
    """Samples as libsndfile takes them for a FLAC file: int16, or int32 of which it takes the upper 24 bits."""
    if block.dtype != np.float32:
        return block
    loudest = float(np.abs(block).max())
    if not np.isfinite(loudest):
        raise _damaged("it holds samples that are not finite numbers")
    if loudest > _LOUDEST:
        raise _unsupported(f"it holds samples of {loudest:.3g} times full scale")
    if bits == 16:
        return pcm16(block)
    top = 1 << 23
    scaled: np.ndarray = (np.clip(block, -1, 1) * np.float32(top)).round().clip(max=top - 1).astype(np.int32) << 8
    return scaled
