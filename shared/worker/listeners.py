"""The listeners to songs that are being made, as gateways report them: which song must go on soon."""

import logging
import time
from collections.abc import Callable

from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.errors import Unreadable
from shared.nats.errors import nats_errors
from shared.schema.decoding import read_listening
from shared.schema.listening import Listening

log = logging.getLogger(__name__)

FORGET_SECONDS = 10.0  # after which a report counts no more; gateways repeat theirs every two


class Listeners:
    """The latest reports. Where they are lost there are no listeners, and throughput comes first.

    A task that has to know of a change looks every half second: what is reported changes by itself as time goes by.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._dry_at: dict[str, dict[str, tuple[float, float]]] = {}  # by song and gateway: when it came, and runs dry
        self._forgotten = clock()  # when old reports were last removed

    async def open(self, nc: Client) -> None:
        """Subscribe to the reports. Raises `Unavailable`."""

        async def on_report(message: Msg) -> None:
            try:
                self.add(read_listening(message.subject, message.data))
            except Unreadable as error:
                log.warning("a report of listeners cannot be read: %s", error)

        with nats_errors("reports of listeners cannot be subscribed to"):
            await nc.subscribe("ctl.listen.*", cb=on_report)

    def add(self, report: Listening) -> None:
        """Take a report."""
        now = self._clock()
        if now - self._forgotten > FORGET_SECONDS:  # not at each: there may be thousands
            self._forgotten = now
            self._dry_at = {job_id: kept for job_id in self._dry_at if (kept := self._counting(job_id))}
        self._dry_at.setdefault(report.job_id, {})[report.gateway] = now, now + report.buffered

    def dry_in(self, job_id: str) -> float | None:
        """Seconds until a listener to a song has played all that was decoded when it was reported, at least 0.

        None where there is no listener.
        """
        dry_at = [moment for _, moment in self._counting(job_id).values()]
        return max(0.0, min(dry_at) - self._clock()) if dry_at else None

    def soonest(self) -> float | None:
        """The least of `dry_in` of all songs; None where no song has listeners."""
        found = [dry_in for job_id in self._dry_at if (dry_in := self.dry_in(job_id)) is not None]
        return min(found, default=None)

    def _counting(self, job_id: str) -> dict[str, tuple[float, float]]:
        """The reports of a song that still count, by gateway."""
        oldest = self._clock() - FORGET_SECONDS
        return {name: found for name, found in self._dry_at.get(job_id, {}).items() if found[0] >= oldest}
