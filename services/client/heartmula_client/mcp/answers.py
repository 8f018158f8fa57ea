"""What the tools answer with. Times are RFC 3339, durations of audio seconds; what is not known is left out."""

from typing import Annotated, Any, Self

import msgspec
from mcp.types import CallToolResult, ContentBlock, ResourceLink, TextContent
from pydantic import BaseModel, Field

from heartmula_client.responses import Accepted, Recording, Song, Songs

SCHEME = "heartmula"
_MEDIA_TYPES = {"flac": "audio/flac", "wav": "audio/wav", "mp3": "audio/mpeg", "ogg": "audio/ogg"}

StreamUrl = Annotated[str, Field(description="the audio from its first sound on, while it is made and afterwards")]
ResultUrl = Annotated[str, Field(description="the audio file, once the song is completed")]


class AcceptedAnswer(BaseModel):
    """Songs that are in the queue, on disk."""

    job_id: str
    status: str
    not_before: Annotated[str | None, Field(description="when it is queued, where that is later")] = None
    queue_position: Annotated[int | None, Field(description="songs before it")] = None
    eta: Annotated[str | None, Field(description="when it is expected to be completed")] = None
    stream_url: StreamUrl
    result_url: ResultUrl
    variants: Annotated[list[str] | None, Field(description="ids of all songs, where several were asked for")] = None

    @classmethod
    def of(cls, accepted: Accepted, url: str) -> "AcceptedAnswer":
        """The answer for songs that the service at `url` has accepted."""
        base = f"{url}/generate/{accepted.job_id}"
        more = {
            "stream_url": f"{base}/stream",
            "result_url": f"{base}/result",
            "variants": [each.job_id for each in accepted.variants] or None,
        }
        return cls.model_validate(msgspec.to_builtins(accepted) | more)


class SongAnswer(BaseModel):
    """The state of a song."""

    job_id: str
    status: Annotated[str, Field(description="queued, generating, decoding, completed, failed or cancelled")]
    ended: Annotated[bool, Field(description="whether the state is final")]
    progress: Annotated[float, Field(description="0–100")] = 0
    name: Annotated[str | None, Field(description="its title, else its first line, else its tags")] = None
    playable_seconds: Annotated[float, Field(description="seconds of audio that can be heard already")] = 0
    stage: str | None = None
    not_before: Annotated[str | None, Field(description="when it is queued, or was, where it was to wait")] = None
    queue_position: Annotated[int | None, Field(description="songs before it, while it waits")] = None
    eta: Annotated[str | None, Field(description="when it is expected to be completed")] = None
    error: Annotated[str | None, Field(description="why it failed")] = None
    duration: Annotated[float | None, Field(description="seconds of audio")] = None
    seed: int | None = None
    created_at: str = ""
    completed_at: Annotated[str | None, Field(description="when it ended, however it ended")] = None
    stream_url: StreamUrl
    result_url: Annotated[str | None, Field(description="the audio file; there once the song is completed")] = None

    @classmethod
    def of(cls, song: Song, url: str) -> Self:
        """The answer for a song of the service at `url`."""
        base = f"{url}/generate/{song.job_id}"
        more = {
            "ended": song.ended,
            "name": song.name or None,
            "stream_url": f"{base}/stream",
            "result_url": f"{base}/result" if song.status == "completed" else None,
        }
        return cls.model_validate(msgspec.to_builtins(song) | more)


class SongDetailsAnswer(SongAnswer):
    """The state of a song, what was asked for, and the songs that it belongs with."""

    request: Annotated[dict[str, Any], Field(description="lyrics, tags and what else makes the same song again")] = {}
    parent: Annotated[dict[str, Any] | None, Field(description="what it goes on from")] = None
    children: Annotated[list[str] | None, Field(description="ids of songs that go on from it")] = None


class SongsAnswer(BaseModel):
    """A page of songs, newest first."""

    songs: list[SongAnswer]
    next: Annotated[str | None, Field(description="cursor of the next page; none on the last one")] = None

    @classmethod
    def of(cls, page: Songs, url: str) -> "SongsAnswer":
        """The answer for a page of songs of the service at `url`."""
        return cls(songs=[SongAnswer.of(song, url) for song in page.songs], next=page.next)


class CancelledAnswer(BaseModel):
    """A song that was cancelled, now or before."""

    job_id: str
    status: str


class RecordingAnswer(BaseModel):
    """The state of a recording."""

    recording_id: str
    status: Annotated[str, Field(description="queued, encoding, ready or failed; songs can go on from a ready one")]
    ended: Annotated[bool, Field(description="whether the state is final")]
    progress: Annotated[float, Field(description="0–100, of the encoding")] = 0
    title: str | None = None
    duration: Annotated[float | None, Field(description="seconds of audio")] = None
    error: Annotated[str | None, Field(description="why it failed")] = None
    audio_url: str

    @classmethod
    def of(cls, recording: Recording, url: str) -> "RecordingAnswer":
        """The answer for a recording of the service at `url`."""
        address = f"{url}/recordings/{recording.recording_id}/audio"
        return cls.model_validate(msgspec.to_builtins(recording) | {"ended": recording.ended, "audio_url": address})


def song_uri(job_id: str) -> str:
    """The resource of a song."""
    return f"{SCHEME}://songs/{job_id}"


def result(answer: BaseModel, *links: ResourceLink) -> CallToolResult:
    """The result of a tool: an answer, as text and structured, and links to what belongs to it."""
    content: list[ContentBlock] = [TextContent(text=answer.model_dump_json(exclude_none=True)), *links]
    return CallToolResult(content=content, structured_content=answer.model_dump(mode="json", exclude_none=True))


def audio_link(song: Song, url: str) -> list[ResourceLink]:
    """The link to the audio of a completed song; none of another one."""
    if song.status != "completed":
        return []
    form = song.format or "flac"
    name = f"{song.name or song.job_id}.{form}"
    address = f"{url}/generate/{song.job_id}/result"
    return [ResourceLink(name=name, uri=address, mime_type=_MEDIA_TYPES.get(form, "application/octet-stream"))]
