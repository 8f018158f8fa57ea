"""Parts that all structures share: the version of the schema, names that become parts of subjects, points in time."""

import re
from datetime import UTC, datetime
from typing import Annotated

from msgspec import Meta

VERSION = "0.1.0"  # of this software
SCHEMA = 1
# Of decode messages of songs whose tokens are still being made. A version that knows `SCHEMA` alone waits for whole
# songs, and leaves such a message to a newer worker.
UNFINISHED_SCHEMA = 2
# Of records and messages of songs that go on from another one. A version that knows less would leave that out.
CONTINUED_SCHEMA = 2
# Of records of recordings, and of messages about them. A version that knows less would take one for a song.
RECORDING_SCHEMA = 3
# Of records of songs that wait for their time. A version that knows less would queue them at once.
DEFERRED_SCHEMA = 4
# Both become parts of subjects and keys: nothing in them may be a wildcard, a separator or a path.
JOB_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
TENANT_NAME = re.compile(r"[0-9A-Za-z_-]{1,64}")
Seconds = Annotated[float, Meta(ge=0, lt=253_402_300_000)]  # since the epoch, in years of four digits


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
