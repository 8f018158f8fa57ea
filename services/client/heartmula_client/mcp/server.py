"""The MCP server: tools and resources over a `SongService`, whatever carries the messages."""

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from mcp import MCPError
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError, ToolError, UnexpectedToolError
from mcp.types import INTERNAL_ERROR, CallToolResult, InputRequiredResult, Resource, Tool, ToolAnnotations
from pydantic import ValidationError

from heartmula_client.errors import ClientError, UnknownRecording, UnknownSong
from heartmula_client.mcp.answers import SCHEME, RecordingAnswer, SongDetailsAnswer, song_uri
from heartmula_client.mcp.refusals import in_words
from heartmula_client.mcp.service import SongService
from heartmula_client.mcp.tools import Tools
from heartmula_client.responses import Song

INSTRUCTIONS = """\
Makes songs from lyrics and tags. write_song answers at once with a job_id; watch_song waits for the end and links the \
audio. extend_song makes a song that keeps the beginning of another one. Lyrics are those of the whole song, with \
section lines such as [Verse] and [Chorus]; tags are short, divided by commas: genre, instruments, mood, tempo, voice. \
Songs and recordings are kept for a week. URLs need the same API key as this server, where it has one."""

_LISTED = 20  # songs among the resources
_READS = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)
# A call that is repeated makes another song, unless it has a key.
_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=False)
_ENDS = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)
_FETCHES = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=True)


class SongServer(MCPServer[None]):
    """An MCP server that lists songs among its resources and refuses arguments that a tool does not have."""

    def __init__(self, find_service: Callable[[], SongService]) -> None:
        """`find_service` returns the service of the caller whose message is being answered."""
        super().__init__(
            name="heartmula",
            title="HeartMuLa",
            description="Makes songs from lyrics and tags",
            instructions=INSTRUCTIONS,
            version=version("heartmula-client"),
            subscriptions=False,
            log_level="WARNING",
        )
        self._find_service = find_service
        self._arguments: dict[str, list[str]] = {}  # of each tool
        tools = Tools(find_service)
        self._offer(tools.write_song, "Write a song", _ADDS)
        self._offer(tools.extend_song, "Go on from a song or a recording", _ADDS)
        self._offer(tools.watch_song, "Wait for a song", _READS)
        self._offer(tools.show_song, "Show a song", _READS)
        self._offer(tools.list_songs, "List songs", _READS)
        self._offer(tools.cancel_song, "Cancel a song", _ENDS)
        self._offer(tools.upload_recording, "Upload a recording", _FETCHES)
        self._offer(tools.show_recording, "Show a recording", _READS)
        self.resource(
            f"{SCHEME}://songs/{{job_id}}",
            name="song",
            title="A song",
            description="state, lyrics, tags, seed and addresses of the audio, as JSON",
            mime_type="application/json",
        )(self._song)
        self.resource(
            f"{SCHEME}://songs/{{job_id}}/lyrics",
            name="lyrics",
            title="The lyrics of a song",
            mime_type="text/plain",
        )(self._lyrics)
        self.resource(
            f"{SCHEME}://recordings/{{recording_id}}",
            name="recording",
            title="A recording",
            description="state and address of the audio, as JSON",
            mime_type="application/json",
        )(self._recording)

    def _offer(self, tool: Callable[..., Any], title: str, annotations: ToolAnnotations) -> None:
        self._arguments[tool.__name__] = [name for name in inspect.signature(tool).parameters if name != "context"]
        self.add_tool(tool, title=title, description=inspect.getdoc(tool), annotations=annotations)

    async def list_tools(self) -> list[Tool]:
        """All tools, whose schemas say that there are no other arguments."""
        return [
            tool.model_copy(update={"input_schema": tool.input_schema | {"additionalProperties": False}})
            for tool in await super().list_tools()
        ]

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[None, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """Call a tool. An argument that it does not have, or a value that does not fit, is refused in words."""
        known = self._arguments.get(name, [])
        unknown = [argument for argument in arguments if argument not in known]
        if known and unknown:
            raise ToolError(f"{', '.join(unknown)[:200]}: no argument of {name}; it has {', '.join(known)}")
        try:
            return await super().call_tool(name, arguments, context)
        except UnexpectedToolError:
            raise
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError):
                raise ToolError(_misfits(error.__cause__)) from error.__cause__
            raise

    async def list_resources(self) -> list[Resource]:
        """The newest songs and their lyrics."""
        try:
            page = await self._find_service().songs(_LISTED, None, None, None)
        except ClientError as error:
            raise MCPError(INTERNAL_ERROR, in_words(error)) from error
        found = []
        for song in page.songs:
            uri, name = song_uri(song.job_id), song.name or song.job_id
            found.append(Resource(name=name, uri=uri, description=song.status, mime_type="application/json"))
            found.append(Resource(name=f"{name}: lyrics", uri=f"{uri}/lyrics", mime_type="text/plain"))
        return found

    async def _song(self, job_id: str) -> str:
        song = await self._find_song(job_id)
        return SongDetailsAnswer.of(song, self._find_service().url).model_dump_json(exclude_none=True)

    async def _lyrics(self, job_id: str) -> str:
        return str((await self._find_song(job_id)).request.get("lyrics", ""))

    async def _recording(self, recording_id: str) -> str:
        service = self._find_service()
        try:
            recording = await service.recording(recording_id)
        except UnknownRecording as error:
            raise ResourceNotFoundError(in_words(error)) from error
        except ClientError as error:
            raise ResourceError(in_words(error)) from error
        return RecordingAnswer.of(recording, service.url).model_dump_json(exclude_none=True)

    async def _find_song(self, job_id: str) -> Song:
        try:
            return await self._find_service().song(job_id)
        except UnknownSong as error:
            raise ResourceNotFoundError(in_words(error)) from error
        except ClientError as error:
            raise ResourceError(in_words(error)) from error


def _misfits(error: ValidationError) -> str:
    """What is wrong with the arguments of a call."""
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
