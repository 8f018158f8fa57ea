"""MCP server for agents: tools and resources, served on standard input and output, and by the gateway at ``/mcp``.

It needs the package `mcp`. The gateway has these tools over its own parts; `SongService` is what they need of it.
"""

from heartmula_client.errors import Refused, ServiceFault, UnknownRecording, UnknownSong
from heartmula_client.mcp.http_service import HttpSongService
from heartmula_client.mcp.server import SongServer
from heartmula_client.mcp.service import SongService
from heartmula_client.responses import Accepted, Event, Recording, Song, Songs, read_frame

__all__ = [
    "Accepted",
    "Event",
    "HttpSongService",
    "Recording",
    "Refused",
    "ServiceFault",
    "Song",
    "SongServer",
    "SongService",
    "Songs",
    "UnknownRecording",
    "UnknownSong",
    "read_frame",
]
