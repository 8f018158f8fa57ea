"""The metadata in an audio file, in the two forms that files have for it; equal metadata makes equal bytes."""

from dataclasses import dataclass
from io import BytesIO

from mutagen.flac import VCFLACDict
from mutagen.id3 import ID3, TCON, TIT2, TSSE, TXXX, USLT

from shared.schema.request import GenerateRequest

SOFTWARE = "HeartMuLa on JetStream"


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


def vorbis_comment(tags: SongTags, *, framing: bool) -> bytes:
    """The metadata as a Vorbis comment, for FLAC and Ogg; `framing` adds the bit that Ogg Vorbis ends it with."""
    comment = VCFLACDict()
    comment.vendor = SOFTWARE
    named = {
        "title": tags.title,
        "genre": tags.tags,
        "lyrics": tags.lyrics,
        "seed": None if tags.seed is None else str(tags.seed),
        "encoder": SOFTWARE,
    }
    comment.extend((name, value) for name, value in named.items() if value)
    return bytes(comment.write(framing=framing))


def id3(tags: SongTags) -> bytes:
    """The metadata as an ID3v2.4 tag without padding, for MP3 and WAV."""
    frames = ID3()
    if tags.title:
        frames.add(TIT2(encoding=3, text=tags.title))
    if tags.tags:
        frames.add(TCON(encoding=3, text=tags.tags))
    if tags.lyrics:
        frames.add(USLT(encoding=3, lang="und", desc="", text=tags.lyrics))
    if tags.seed is not None:
        frames.add(TXXX(encoding=3, desc="SEED", text=str(tags.seed)))
    frames.add(TSSE(encoding=3, text=SOFTWARE))
    tag = BytesIO()
    frames.save(tag, v1=0, padding=lambda _: 0)
    return tag.getvalue()
