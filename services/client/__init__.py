"""Python client of the service, and the command line ``heartmula``. Both use HTTP and nothing behind it.

::

    async with Client("http://127.0.0.1:8000") as client:
        accepted = await client.generate("[Verse]\\nHello world", "pop,piano", max_duration_ms=20_000)
        async for event in client.watch(accepted.job_id):
            print(event.status, event.progress)
        print(await client.download(accepted.job_id))
"""

from services.client.client import DEFAULT_URL, Client
from services.client.errors import (
    ClientError,
    Refused,
    ServiceFault,
    SongIncomplete,
    UnexpectedAnswer,
    UnknownSong,
    Unreachable,
)
from services.client.responses import Accepted, Device, Devices, Event, Health, Song, Songs, Worker

__all__ = [
    "DEFAULT_URL",
    "Accepted",
    "Client",
    "ClientError",
    "Device",
    "Devices",
    "Event",
    "Health",
    "Refused",
    "ServiceFault",
    "Song",
    "SongIncomplete",
    "Songs",
    "UnexpectedAnswer",
    "UnknownSong",
    "Unreachable",
    "Worker",
]
