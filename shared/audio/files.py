"""Audio files: written bit by bit, tags first, so that a file that grows is a stream."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import assert_never

import numpy as np

from shared.audio.encoder import Encoder
from shared.audio.flac import FlacEncoder
from shared.audio.forms import Form
from shared.audio.g711 import alaw, ulaw
from shared.audio.mp3 import Mp3Encoder
from shared.audio.ogg import OggEncoder
from shared.audio.opus import OpusEncoder
from shared.audio.pcm import pcm16
from shared.audio.raw import RawEncoder
from shared.audio.resampling import ConvertingEncoder
from shared.audio.tags import SongTags
from shared.audio.wav import WavEncoder


def _encoder(form: Form, song_rate: int, tags: SongTags, first_block: int) -> Encoder:
    if form.sample_rate is None:
        return _own_encoder(form, song_rate, tags, first_block)
    return ConvertingEncoder(_own_encoder(form, form.sample_rate, tags, 0), song_rate, form.sample_rate, form.channels)


def _own_encoder(form: Form, sample_rate: int, tags: SongTags, first_block: int) -> Encoder:
    match form.codec:
        case "flac":
            return FlacEncoder(sample_rate, tags, first_block)
        case "wav":
            return WavEncoder(sample_rate, tags)
        case "mp3":
            return Mp3Encoder(sample_rate, tags, form.channels, form.bit_rate)
        case "ogg":
            return OggEncoder(sample_rate, tags)
        case "opus":
            return OpusEncoder(sample_rate, tags, form.channels, form.bit_rate)
        case "pcm":
            return RawEncoder(lambda pcm: pcm.astype("<i2", copy=False))
        case "ulaw":
            return RawEncoder(ulaw)
        case "alaw":
            return RawEncoder(alaw)
    assert_never(form.codec)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"audio could not be written to {folder}: {error.strerror}") from error


class AudioWriter:
    """Writes one file in a `Form` from 16-bit stereo.

    Use as a context manager; leaving it without an error finishes the file. The same samples and arguments make the
    same bytes, however the samples are cut. A full disk is an `OSError`, from the opening to the end.

    Another thread may read the file while it grows, as far as it is long at the moment: it is a stream from its first
    byte on. Its bytes never change, but for the first `header_size` of them, once, at the end: FLAC's STREAMINFO,
    WAV's sizes and MP3's info frame tell the length then. Up to two
    seconds of audio wait to be encoded.
    """

    def __init__(self, path: Path, form: Form, sample_rate: int, tags: SongTags, *, first_block: int = 0) -> None:
        """Open the file, for audio of `sample_rate` Hz, which is changed where the form asks for it.

        `first_block` is the number of FLAC's first block, for audio that begins in mid-song: players show its time in
        the song. Other formats have no such number.
        """
        self._encoder = _encoder(form, sample_rate, tags, first_block)
        self._folder = path.parent
        self.header_size = len(self._encoder.header)  # bytes
        with _disk_errors(self._folder):
            self._file = path.open("wb")
        try:
            self._append(self._encoder.header)
        except OSError:
            self._close()
            raise

    def write(self, audio: np.ndarray) -> None:
        """Append float32 or int16 ``[samples, 2]``; float32 becomes int16 as `pcm16` makes it.

        Raises `SongError` for audio that is not finite, `OSError` for a full disk.
        """
        self._append(self._encoder.encode(audio if audio.dtype == np.int16 else pcm16(audio)))

    def _append(self, data: bytes) -> None:
        with _disk_errors(self._folder):
            self._file.write(data)
            self._file.flush()

    def __enter__(self) -> "AudioWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._close()

    def _finish(self) -> None:
        end, header = self._encoder.finish()
        self._append(end)
        self._file.seek(0)
        self._append(header)
        with _disk_errors(self._folder):
            self._file.close()  # where network file systems report a full disk

    def _close(self) -> None:
        self._encoder.close()
        with suppress(OSError):  # of bytes that could not be written: that error is on its way
            self._file.close()
