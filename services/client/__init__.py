"""Python client of the service, and the command line ``heartmula``. Both use HTTP and nothing behind it.

::

    async with Client("http://127.0.0.1:8000") as client:
        accepted = await client.generate("[Verse]\\nHello world", "pop,piano", max_duration_ms=20_000)
        async for event in client.watch(accepted.job_id):
            print(event.status, event.progress)
        print(await client.download(accepted.job_id))
"""

from services.client.client import Client
from services.client.connection import DEFAULT_URL
from services.client.errors import (
    ClientError,
    Refused,
    ServiceFault,
    SongIncomplete,
    UnexpectedAnswer,
    UnknownRecording,
    UnknownSong,
    Unreachable,
)
from services.client.responses import (
    Accepted,
    Device,
    Devices,
    Event,
    Health,
    Parent,
    Recording,
    Recordings,
    Song,
    Songs,
    Tree,
    Version,
    Worker,
)
from shared.schema.request import ContinueFrom

__all__ = [
    "DEFAULT_URL",
    "Accepted",
    "Client",
    "ClientError",
    "ContinueFrom",
    "Device",
    "Devices",
    "Event",
    "Health",
    "Parent",
    "Recording",
    "Recordings",
    "Refused",
    "ServiceFault",
    "Song",
    "SongIncomplete",
    "Songs",
    "Tree",
    "UnexpectedAnswer",
    "UnknownRecording",
    "UnknownSong",
    "Unreachable",
    "Version",
    "Worker",
]
