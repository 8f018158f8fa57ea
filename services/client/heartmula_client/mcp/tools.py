"""The tools. Their docstrings are what an agent reads."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult
from pydantic import Field

from heartmula_client.mcp import arguments as args
from heartmula_client.mcp.answers import (
    AcceptedAnswer,
    CancelledAnswer,
    RecordingAnswer,
    SongAnswer,
    SongDetailsAnswer,
    SongsAnswer,
    audio_link,
    result,
)
from heartmula_client.mcp.progress import Progress, at_most, describe
from heartmula_client.mcp.refusals import refusals
from heartmula_client.mcp.service import SongService
from heartmula_client.responses import Event, Recording

WAIT_SECONDS = 45.0  # many clients give a tool up after 60
_POLL_SECONDS = 1.0


class Tools:
    """The tools of one server. `find_service` returns the service of the caller whose call is being answered."""

    def __init__(self, find_service: Callable[[], SongService]) -> None:
        self._find_service = find_service

    async def write_song(
        self,
        lyrics: args.Lyrics = "",
        tags: args.Tags = "",
        max_duration_ms: args.MaxDuration = None,
        instrumental: args.Instrumental = False,
        title: args.Title = None,
        seed: args.Seed = None,
        variants: args.Variants = None,
        format: args.Format = None,  # noqa: A002, the name in the API
        temperature: args.Temperature = None,
        cfg_scale: args.CfgScale = None,
        topk: args.TopK = None,
        not_before: args.NotBefore = None,
        idempotency_key: args.Key = None,
    ) -> Annotated[CallToolResult, AcceptedAnswer]:
        """Request a song from lyrics and tags, or from one of both.

        Answers at once, when the song is in the queue: making it takes from a part of its length to several times it.
        Then call watch_song with the job_id. A URL may be given to the user at once: stream_url plays while the song
        is being made.
        """
        request = {
            "lyrics": lyrics,
            "tags": tags,
            "max_duration_ms": max_duration_ms,
            "instrumental": instrumental or None,
            "title": title,
            "seed": seed,
            "variants": variants,
            "format": format,
            "temperature": temperature,
            "cfg_scale": cfg_scale,
            "topk": topk,
            "not_before": not_before,
        }
        return await self._write(request, idempotency_key)

    async def extend_song(
        self,
        job_id: Annotated[str | None, Field(description="a completed song to go on from; or give recording_id")] = None,
        recording_id: Annotated[str | None, Field(description="a recording that is ready, to go on from")] = None,
        at_ms: Annotated[
            int | None, Field(description="how much of it to keep, in milliseconds; all of it if left out")
        ] = None,
        lyrics: Annotated[
            str | None,
            Field(
                description="the words of the whole song, what is kept included; those of the other song if left out; "
                "a recording has none"
            ),
        ] = None,
        tags: Annotated[
            str | None,
            Field(description="for the whole song; those of the other one if left out; a recording has none"),
        ] = None,
        max_duration_ms: Annotated[
            int | None,
            Field(
                description="longest whole song wanted, the kept part included; default: that and two minutes, as fits"
            ),
        ] = None,
        instrumental: args.Instrumental = False,
        min_new_ms: Annotated[
            int | None, Field(description="the model cannot end the song before so much is new; default 10000")
        ] = None,
        title: args.Title = None,
        seed: args.Seed = None,
        variants: args.Variants = None,
        format: args.Format = None,  # noqa: A002, the name in the API
        temperature: args.Temperature = None,
        cfg_scale: args.CfgScale = None,
        topk: args.TopK = None,
        not_before: args.NotBefore = None,
        idempotency_key: args.Key = None,
    ) -> Annotated[CallToolResult, AcceptedAnswer]:
        """Request a song that begins as another one, or as a recording, and goes on anew from a moment of it.

        To make a song longer, to change its chorus or its end, or to begin with music of the user (upload_recording).
        The result is a song of its own; the other one stays as it is. Cut between two lines. Answers at once, as
        write_song does.
        """
        if (job_id is None) == (recording_id is None):
            raise ToolError("give either job_id or recording_id: what the song goes on from")
        usual: dict[str, Any] = {}
        if job_id is not None and (lyrics is None or tags is None):
            with refusals():
                usual = (await self._find_service().song(job_id)).request
        if instrumental:
            lyrics = lyrics or ""
        elif job_id is None and lyrics is None:
            raise ToolError("lyrics: a recording has none; give those of the whole song, or an empty text")
        origin = {"job_id": job_id, "recording_id": recording_id, "at_ms": at_ms}
        request = {
            "lyrics": usual.get("lyrics", "") if lyrics is None else lyrics,
            "tags": usual.get("tags", "") if tags is None else tags,
            "instrumental": (instrumental or (lyrics is None and usual.get("instrumental"))) or None,
            "continue_from": {name: value for name, value in origin.items() if value is not None},
            "max_duration_ms": max_duration_ms,
            "min_new_ms": min_new_ms,
            "title": title,
            "seed": seed,
            "variants": variants,
            "format": format,
            "temperature": temperature,
            "cfg_scale": cfg_scale,
            "topk": topk,
            "not_before": not_before,
        }
        return await self._write(request, idempotency_key)

    async def watch_song(
        self, context: Context, job_id: args.JobId, wait_seconds: args.WaitSeconds = WAIT_SECONDS
    ) -> Annotated[CallToolResult, SongAnswer]:
        """Wait until a song has ended, with progress, and return its state; at its end with a link to the audio.

        Where `ended` is false in the answer, the time was up first: call it again. Cancelling this call ends the wait
        and not the song.
        """
        service, progress = self._find_service(), Progress(context)

        async def show(event: Event) -> None:
            await progress.report(event.progress, describe(event))

        with refusals():
            if wait_seconds:
                async with at_most(wait_seconds):
                    await service.follow(job_id, show)
            song = await service.song(job_id)
        return result(SongAnswer.of(song, service.url), *audio_link(song, service.url))

    async def show_song(self, job_id: args.JobId) -> Annotated[CallToolResult, SongDetailsAnswer]:
        """Show a song as it is now, with its lyrics, tags and seed, and a link to its audio once it is completed."""
        service = self._find_service()
        with refusals():
            song = await service.song(job_id)
        return result(SongDetailsAnswer.of(song, service.url), *audio_link(song, service.url))

    async def list_songs(
        self,
        limit: args.Limit = 20,
        cursor: args.Cursor = None,
        status: args.State = None,
        parent: Annotated[str | None, Field(description="only songs that go on from this song or recording")] = None,
    ) -> Annotated[CallToolResult, SongsAnswer]:
        """List songs, newest first, a page at a time. Songs are kept for a week."""
        service = self._find_service()
        with refusals():
            page = await service.songs(limit, cursor, status, parent)
        return result(SongsAnswer.of(page, service.url))

    async def cancel_song(self, job_id: args.JobId) -> Annotated[CallToolResult, CancelledAnswer]:
        """Cancel a song that waits or is being made; its audio so far is lost. A completed song is not touched."""
        with refusals():
            status = await self._find_service().cancel(job_id)
        return result(CancelledAnswer(job_id=job_id, status=status))

    async def upload_recording(
        self,
        context: Context,
        source: Annotated[
            str,
            Field(
                description="address (https:// or http://) of a FLAC, WAV, MP3 or Ogg file; for a server that runs on "
                "the user's machine also the path of a file"
            ),
        ],
        title: Annotated[str | None, Field(description="its name in lists; a local file's name if left out")] = None,
        wait_seconds: args.WaitSeconds = WAIT_SECONDS,
    ) -> Annotated[CallToolResult, RecordingAnswer]:
        """Upload a recording, for extend_song to go on from, and wait until it is ready.

        The same file is the same recording: a repeated call makes no second one. Where `ended` is false in the answer,
        call show_recording.
        """
        service = self._find_service()
        with refusals():
            recording = await service.upload(source, title)
            return result(await _settle(service, recording, context, wait_seconds))

    async def show_recording(
        self, context: Context, recording_id: args.RecordingId, wait_seconds: args.WaitSeconds = 0
    ) -> Annotated[CallToolResult, RecordingAnswer]:
        """Show a recording; with wait_seconds, once it is ready or the time is up."""
        service = self._find_service()
        with refusals():
            recording = await service.recording(recording_id)
            return result(await _settle(service, recording, context, wait_seconds))

    async def _write(self, request: dict[str, Any], key: str | None) -> CallToolResult:
        service = self._find_service()
        with refusals():
            accepted = await service.write({n: v for n, v in request.items() if v is not None}, key)
        return result(AcceptedAnswer.of(accepted, service.url))


async def _settle(service: SongService, recording: Recording, context: Context, seconds: float) -> RecordingAnswer:
    """Wait until a recording is ready, or failed, or the time is up."""
    progress = Progress(context)
    async with at_most(seconds):
        while not recording.ended:
            await progress.report(recording.progress, recording.status)
            await asyncio.sleep(_POLL_SECONDS)
            recording = await service.recording(recording.recording_id)
    return RecordingAnswer.of(recording, service.url)
