"""Audio files: written block by block while a song is decoded, checked before every encoder, tagged at the end."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile
from mutagen.flac import FLAC
from mutagen.id3 import ID3, TCON, TIT2, TSSE, TXXX, USLT
from mutagen.mp3 import MP3
from mutagen.wave import WAVE

from shared.errors import SongError
from shared.messages import AudioFormat

CONTENT_TYPES: dict[AudioFormat, str] = {"flac": "audio/flac", "wav": "audio/wav", "mp3": "audio/mpeg"}
SOFTWARE = "HeartMuLa on JetStream"
_ENCODINGS: dict[AudioFormat, tuple[str, str]] = {
    "flac": ("FLAC", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


@dataclass(frozen=True, kw_only=True)
class SongTags:
    """What is written into the file about the song."""

    title: str | None
    tags: str  # style, comma-separated
    lyrics: str
    seed: int | None


class AudioWriter:
    """Writes one stereo file: 16-bit FLAC or WAV, or MP3 at a variable bit rate.

    Use as a context manager; leaving it without an error finishes the file and tags it.
    """

    def __init__(self, path: Path, audio_format: AudioFormat, sample_rate: int, tags: SongTags) -> None:
        container, encoding = _ENCODINGS[audio_format]
        self._path, self._format, self._tags = path, audio_format, tags
        self._block = sample_rate  # a second: encoders were seen to crash on whole songs
        self._file = soundfile.SoundFile(path, "w", sample_rate, 2, encoding, format=container)

    def write(self, audio: np.ndarray) -> None:
        """Append float32 ``[samples, 2]``. Raises `SongError` for audio that is not finite, `OSError` for a full disk.

        Louder than full scale is clipped, in every format alike: it is heard less than another level would be, and
        the level of a song cannot be known while it is still being decoded.
        """
        if not np.isfinite(audio).all():  # in the MP3 encoder this would end the process
            raise SongError("the codec produced audio that is not finite; try another seed, or HEARTMULA_MODEL_DTYPE")
        audio = np.clip(audio, -1, 1)
        for start in range(0, len(audio), self._block):
            try:
                self._file.write(audio[start : start + self._block])
            except (soundfile.LibsndfileError, AssertionError) as error:  # it asserts that all was written
                raise OSError(f"audio could not be written to {self._path.parent}: {error}") from None

    def __enter__(self) -> "AudioWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._write_tags()

    def _write_tags(self) -> None:
        tags = self._tags
        seed = str(tags.seed) if tags.seed is not None else None
        if self._format == "flac":
            flac = FLAC(self._path)
            named = {"title": tags.title, "genre": tags.tags, "lyrics": tags.lyrics, "seed": seed, "encoder": SOFTWARE}
            for name, value in named.items():
                if value:
                    flac[name] = value
            flac.save()
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
