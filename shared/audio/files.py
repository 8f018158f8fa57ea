"""Audio files: written block by block, checked before every encoder, tagged at the end, and read back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile
from mutagen import MutagenError
from mutagen.flac import FLAC
from mutagen.id3 import ID3, TCON, TIT2, TSSE, TXXX, USLT
from mutagen.mp3 import MP3
from mutagen.oggvorbis import OggVorbis
from mutagen.wave import WAVE

from shared.errors import ObjectError, SongError
from shared.schema.request import AudioFormat, GenerateRequest

CONTENT_TYPES: dict[AudioFormat, str] = {
    "flac": "audio/flac",
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
}
SOFTWARE = "HeartMuLa on JetStream"
_ENCODINGS: dict[AudioFormat, tuple[str, str]] = {
    "flac": ("FLAC", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
}
_VORBIS_QUALITY = 0.6  # of 1; nominally 192 kbit/s


@dataclass(frozen=True, kw_only=True)
class SongTags:
    """The metadata that is written into an audio file."""

    title: str | None
    tags: str  # style, comma-separated
    lyrics: str
    seed: int | None

    @classmethod
    def of(cls, request: GenerateRequest) -> "SongTags":
        """The metadata that a request contains."""
        return cls(title=request.title, tags=request.tags, lyrics=request.lyrics, seed=request.seed)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Raise `OSError` for what libsndfile and mutagen make of a full disk; what is written here is never malformed."""
    try:
        yield
    except (soundfile.LibsndfileError, MutagenError, AssertionError) as error:  # soundfile asserts that all was written
        raise OSError(f"audio could not be written to {path.parent}: {error}") from None


class AudioWriter:
    """Writes one stereo file: 16-bit FLAC or WAV, or MP3 or Ogg Vorbis at a variable bit rate.

    Use as a context manager; leaving it without an error finishes the file and tags it. A full disk is an `OSError`,
    from the opening to the tags.
    """

    def __init__(self, path: Path, audio_format: AudioFormat, sample_rate: int, tags: SongTags) -> None:
        container, encoding = _ENCODINGS[audio_format]
        self._path, self._format, self._tags = path, audio_format, tags
        self._block = sample_rate  # a second: encoders were seen to crash on whole songs
        level = 1 - _VORBIS_QUALITY if audio_format == "ogg" else None  # libsndfile counts the other way round
        with _disk_errors(path):
            self._file = soundfile.SoundFile(
                path, "w", sample_rate, 2, encoding, format=container, compression_level=level
            )

    def write(self, audio: np.ndarray) -> None:
        """Append float32 or int16 ``[samples, 2]``; int16 is written to 16-bit files as it is.

        Raises `SongError` for audio that is not finite, `OSError` for a full disk.

        Louder than full scale is clipped, in every format alike: it is heard less than another level would be, and
        the level of a song cannot be known while it is still being decoded.
        """
        if audio.dtype == np.int16 and self._format in ("mp3", "ogg"):
            audio = audio.astype(np.float32) / 32768  # libsndfile 1.2.2 makes noise of MP3 from whole numbers
        if audio.dtype != np.int16:
            if not np.isfinite(audio).all():  # in the MP3 encoder this would end the process
                raise SongError(
                    "the codec produced audio that is not finite; try another seed, or HEARTMULA_MODEL_DTYPE"
                )
            audio = np.clip(audio, -1, 1)
        with _disk_errors(self._path):
            for start in range(0, len(audio), self._block):
                self._file.write(audio[start : start + self._block])

    def __enter__(self) -> "AudioWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _disk_errors(self._path):
            self._file.close()
            if kind is None:
                self._write_tags()

    def _write_tags(self) -> None:
        tags = self._tags
        seed = str(tags.seed) if tags.seed is not None else None
        if self._format in ("flac", "ogg"):
            comments: Any = (FLAC if self._format == "flac" else OggVorbis)(self._path)
            named = {"title": tags.title, "genre": tags.tags, "lyrics": tags.lyrics, "seed": seed, "encoder": SOFTWARE}
            for name, value in named.items():
                if value:
                    comments[name] = value
            comments.save()
            return
        file: Any = (MP3 if self._format == "mp3" else WAVE)(self._path)
        if file.tags is None:
            file.add_tags()
        id3: ID3 = file.tags
        if tags.title:
            id3.add(TIT2(encoding=3, text=tags.title))
        if tags.tags:
            id3.add(TCON(encoding=3, text=tags.tags))
        if tags.lyrics:
            id3.add(USLT(encoding=3, lang="und", desc="", text=tags.lyrics))
        if seed:
            id3.add(TXXX(encoding=3, desc="SEED", text=seed))
        id3.add(TSSE(encoding=3, text=SOFTWARE))
        file.save()


class _SequentialFile(soundfile.SoundFile):  # type: ignore[misc]  # which has no types
    """A file that is read without seeking: `SoundFile` seeks after every block, which garbles MP3."""

    def seekable(self) -> bool:
        return False


def read_audio(path: Path) -> Iterator[np.ndarray]:
    """A file's audio, a second at a time: int16 ``[samples, channels]`` of a 16-bit file, else float32.

    Raises `ObjectError` for a file that is damaged.
    """
    try:
        with _SequentialFile(path) as file:
            dtype = "int16" if file.subtype == "PCM_16" else "float32"
            while len(block := file.read(file.samplerate, dtype, always_2d=True)):
                yield block
    except soundfile.LibsndfileError as error:
        raise ObjectError(f"the audio cannot be read: {error}") from None


def sample_rate_of(path: Path) -> int:
    """A file's sample rate in Hz. Raises as `read_audio`."""
    try:
        return int(soundfile.info(path).samplerate)
    except soundfile.LibsndfileError as error:
        raise ObjectError(f"the audio cannot be read: {error}") from None
