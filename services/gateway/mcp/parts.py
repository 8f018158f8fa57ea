"""What the tools use of a gateway."""

from dataclasses import dataclass

from services.gateway.mcp.fetching import Fetcher
from services.gateway.recordings.status import Recordings
from services.gateway.recordings.uploads import Uploads
from services.gateway.songs.cancel import Canceller
from services.gateway.songs.event_feed import EventFeeds
from services.gateway.songs.status import Songs
from services.gateway.submission.outage import Outage
from services.gateway.submission.service import Submission


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one gateway that the tools use."""

    submission: Submission
    songs: Songs
    canceller: Canceller
    event_feeds: EventFeeds
    recordings: Recordings
    uploads: Uploads
    outage: Outage
    fetcher: Fetcher
