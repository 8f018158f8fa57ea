"""The finished files of a song, made from the pieces of its stream."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from services.codec_worker.song_stream import Piece
from shared.audio.files import AudioWriter
from shared.audio.flac import decode_part, finished_header
from shared.audio.forms import plain
from shared.audio.tags import SongTags
from shared.errors import ObjectError
from shared.schema.job import AudioPart
from shared.schema.request import AudioFormat


class SongFile:
    """Joins pieces into a FLAC file, and writes their samples in the song's format where that is another.

    Pieces without FLAC frames make no FLAC file. Use as a context manager. One call at a time, from any thread. Raises
    `OSError` for a full disk.
    """

    def __init__(
        self, folder: Path, name: str, audio_format: AudioFormat, header: bytes, sample_rate: int, tags: SongTags
    ) -> None:
        """`header` is that of the stream."""
        self.path = folder / f"{name}.{audio_format}"
        self.flac_path = folder / f"{name}.flac"
        self.samples = 0  # a channel
        self.has_flac = False
        self._header, self._md5 = header, hashlib.md5(usedforsecurity=False)
        self._flac: BinaryIO | None = None
        self._open = ExitStack()
        self._writer: AudioWriter | None = None
        if audio_format != "flac":
            self._writer = self._open.enter_context(AudioWriter(self.path, plain(audio_format), sample_rate, tags))

    def add(self, piece: Piece) -> None:
        """Append the next piece."""
        self.samples += len(piece.pcm)
        if self._writer is not None:
            self._writer.write(piece.pcm)
        if piece.frames:
            self._md5.update(piece.pcm.astype("<i2", copy=False).tobytes())
            self._append(piece.frames)

    def add_part(self, part: AudioPart, data: bytes) -> None:
        """Append a part that was stored before. Raises `ObjectError` unless `data` is what the record says."""
        frames = data.removeprefix(self._header)
        pcm = decode_part(self._header, frames) if frames else np.zeros((0, 2), np.int16)
        if (len(data), len(pcm)) != (part.size, part.samples):
            raise ObjectError(f"{part.key} holds {len(pcm)} samples in {len(data)} bytes, not {part}")
        self.add(Piece(frames, pcm))

    def finish(self) -> None:
        """Complete the files."""
        if self._flac is not None:
            self._flac.seek(0)
            self._flac.write(finished_header(self._header, self.samples, self._md5.digest()))
        self._open.close()

    def _append(self, frames: bytes) -> None:
        if self._flac is None:
            self.has_flac = True
            self._flac = self._open.enter_context(self.flac_path.open("wb"))
            self._flac.write(self._header)
        self._flac.write(frames)

    def __enter__(self) -> "SongFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
