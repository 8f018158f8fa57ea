"""Reply subjects: those on which the gateway may answer NATS clients.

A request names the subject of its answer, and the gateway publishes there with its own permissions. A client could thus
make it overwrite records, publish events, or answer a service's request. So the gateway answers only in inboxes, and
never in the inbox of a service.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from prometheus_client import Counter

from shared.nats.connection import inbox_prefix
from shared.nats.subjects import SERVICES
from shared.settings import Settings

log = logging.getLogger(__name__)

_COMMON = frozenset({"_INBOX", "_R_"})  # client libraries' own, and the server's for requests of other accounts
_CLIENT = "_INBOX_client"  # of deploy/nats/roles.conf
_LOG_SECONDS = 60.0


class ReplySubjects:
    """Decides by the first token of a reply subject. A message names no user, but its subject names a tenant."""

    def __init__(self, settings: Settings, refused: Counter) -> None:
        """Read the allowed prefixes from `settings`; `refused` counts dropped requests."""
        more = {prefix.strip() for prefix in settings.reply_prefixes.split(",") if prefix.strip()}
        self._allowed = _COMMON | {_CLIENT} | more
        # Where users have other names, or there are none, the inbox of this process is still known.
        own = {inbox_prefix(settings.nats_url).decode()} - _COMMON
        self._never = {f"_INBOX_{name}" for name in SERVICES} | own
        self._refused = refused
        self._logged = -_LOG_SECONDS  # monotonic

    def allowed(self, reply: str, tenant: str | None = None) -> bool:
        """Whether a request may be answered on this subject; `tenant` owns the songs that it is about, if any."""
        first, _, rest = reply.partition(".")
        allowed = self._allowed | {f"_INBOX_{tenant}"} if tenant else self._allowed
        return bool(rest) and first in allowed and first not in self._never

    def accept(self, message: Msg) -> bool:
        """Whether a request is handled. One that must not be answered is counted and logged, and has to be dropped."""
        subject = message.subject.split(".")
        tenant = None if subject[0] == "$SRV" else subject[1]
        if not message.reply or self.allowed(message.reply, tenant):
            return True
        self._refused.inc()
        if time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            log.warning(
                "dropped a request on %r that is to be answered on %r, which is no inbox of a client: "
                "see HEARTMULA_REPLY_PREFIXES (logged once a minute at most)",
                message.subject[:200],
                message.reply[:200],
            )
        return False


class FilteredConnection:
    """A connection whose subscriptions receive only requests that may be answered.

    nats-py's service framework needs it: it answers some requests by itself.
    """

    def __init__(self, nc: Client, replies: ReplySubjects) -> None:
        self._nc, self._replies = nc, replies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nc, name)

    async def subscribe(self, subject: str, queue: str = "", *, cb: Callable[[Msg], Awaitable[None]]) -> Subscription:
        """Subscribe; `cb` is called only for requests that may be answered."""

        async def filtered(message: Msg) -> None:
            if self._replies.accept(message):
                await cb(message)

        return await self._nc.subscribe(subject, queue=queue, cb=filtered)
