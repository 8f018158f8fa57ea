"""Python clients of the service, and the command line ``heartmula``. All use HTTP and nothing behind it.

::

    with Client("http://127.0.0.1:8000") as client:
        accepted = client.generate("[Verse]\\nHello world", "pop,piano", max_duration_ms=20_000)
        for event in client.watch(accepted.job_id):
            print(event.status, event.progress)
        print(client.download(accepted.job_id))

`AsyncClient` has the same methods for asyncio.
"""

from heartmula_client.client import AsyncClient
from heartmula_client.connection import DEFAULT_URL
from heartmula_client.errors import (
    ClientError,
    Refused,
    ServiceFault,
    SongIncomplete,
    UnexpectedAnswer,
    UnknownRecording,
    UnknownSong,
    Unreachable,
)
from heartmula_client.responses import (
    Accepted,
    Device,
    Devices,
    Event,
    Health,
    Lease,
    Parent,
    Queues,
    Recording,
    Recordings,
    Server,
    Song,
    Songs,
    Tree,
    TreeRecording,
    Version,
    Waiting,
    Worker,
)
from heartmula_client.schema import (
    AudioFormat,
    ContinueFrom,
    Priority,
    RecordingStatus,
    Status,
    WebhookEvent,
)
from heartmula_client.sync_client import Client

__all__ = [
    "DEFAULT_URL",
    "Accepted",
    "AsyncClient",
    "AudioFormat",
    "Client",
    "ClientError",
    "ContinueFrom",
    "Device",
    "Devices",
    "Event",
    "Health",
    "Lease",
    "Parent",
    "Priority",
    "Queues",
    "Recording",
    "RecordingStatus",
    "Recordings",
    "Refused",
    "Server",
    "ServiceFault",
    "Song",
    "SongIncomplete",
    "Songs",
    "Status",
    "Tree",
    "TreeRecording",
    "UnexpectedAnswer",
    "UnknownRecording",
    "UnknownSong",
    "Unreachable",
    "Version",
    "Waiting",
    "WebhookEvent",
    "Worker",
]
