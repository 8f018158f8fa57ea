"""The connection to NATS: a first failure is reported at once, a later outage is waited out."""

import asyncio
import logging
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client

from shared.aio import end
from shared.causes import address, describe_error, is_final
from shared.errors import ConfigError, Rejected, Unavailable
from shared.schema.decoding import UNREADABLE
from shared.settings import Settings
from shared.waiting import ThrottledLog

log = logging.getLogger(__name__)

_ATTEMPT_SECONDS = 5.0  # for the first connection, and for each step of a later one
# Between two attempts to connect again. They grow, but not further: pauses eat the time of the lease.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0


def broker(settings: Settings) -> str:
    """The NATS server's name in messages for people."""
    return f"NATS at {address(settings.nats_url)} (HEARTMULA_NATS_URL)"


def _credentials(url: str) -> dict[str, Any]:
    """Credentials for the nodes of a cluster that the server announces without any."""
    first = urlsplit(url.partition(",")[0])
    return {"user": first.username, "password": first.password} if first.password else {}


def inbox_prefix(url: str) -> bytes:
    """Prefix of the subjects on which a user gets answers; a role may not read another's."""
    user = urlsplit(url.partition(",")[0]).username or ""
    return f"_INBOX_{user}".encode() if re.fullmatch(r"[A-Za-z0-9_-]+", user) else b"_INBOX"


class Connection(Client):
    """A client that reconnects by itself, knows since when and why it is disconnected, and skips unreadable messages.

    The server passes on any bytes as headers and names. nats-py stops reading then, and notices seconds later.
    """

    def __init__(self, settings: Settings, on_reconnect: Callable[[], Awaitable[None]] | None) -> None:
        super().__init__()
        self.up = asyncio.Event()
        self.lost_at: float | None = None  # monotonic
        self._where, self._on_reconnect = broker(settings), on_reconnect
        self._urls = settings.nats_url.split(",")
        self._refused: list[Exception] = []  # why there is no first connection yet
        self._all_refused = asyncio.Event()
        self._was_up, self._ours = False, False
        self._cause = ""  # why there is no connection now
        self._outage_log = ThrottledLog(log.warning)

    @property
    def trouble(self) -> str | None:
        """Why there is no connection, in a sentence; None while there is one."""
        return None if self.is_connected else self._sentence(self._cause or "the connection was lost")

    async def begin(self, **options: Any) -> None:
        """Connect for the first time: one attempt at each node. Raises `ConfigError`, `Rejected` or `Unavailable`."""
        connecting = asyncio.create_task(self._connect(options))
        refused = asyncio.create_task(self._all_refused.wait())
        try:
            # nats-py itself would try for ever, and report nothing.
            await asyncio.wait({connecting, refused}, timeout=_ATTEMPT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if connecting.done() and connecting.exception() is None:
                self._was_up = True
                self.up.set()
                return
            errors = list(self._refused)
            if connecting.done() and (error := connecting.exception()):
                if isinstance(error, nats.errors.Error) and not errors:  # before anything was tried
                    raise ConfigError("HEARTMULA_NATS_URL must be nats://user:password@host:port") from None
                if not isinstance(error, nats.errors.Error | OSError):
                    raise error
                errors.append(error)
        finally:
            await end(connecting, refused)
            if not self._was_up:
                await self.close()
        # A refusal says more than the closed connections around it.
        reason = next((error for error in errors if is_final(error)), errors[-1] if errors else TimeoutError())
        kind = Rejected if is_final(reason) else Unavailable
        raise kind("nats", self._sentence(describe_error(reason))) from reason

    async def _connect(self, options: dict[str, Any]) -> None:
        await self.connect(
            self._urls,
            **_credentials(self._urls[0]),
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnect,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=_SHORTEST_PAUSE,  # type: ignore[arg-type]  # seconds; a fraction works
            connect_timeout=int(_ATTEMPT_SECONDS),
            inbox_prefix=inbox_prefix(self._urls[0]),
            ping_interval=5,
            max_outstanding_pings=2,
            **options,
        )

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (IndexError, ValueError):
            return None

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        try:
            subject.decode(), reply.decode()
        except UnicodeDecodeError:
            UNREADABLE.labels("message").inc()
            log.debug("nats: dropped a message whose subject or reply subject is no text")
        else:
            await super()._process_msg(sid, subject, reply, data, headers)

    async def close(self) -> None:
        self._ours = True
        await super().close()

    def _sentence(self, cause: str) -> str:
        return f"no connection to {self._where}: {cause}"

    async def _on_error(self, error: Exception) -> None:
        """Handle a failed attempt to connect, or an error that the server sends, such as a denied permission."""
        if self._was_up and self.is_connected:
            if not isinstance(error, nats.errors.UnexpectedEOF | OSError):  # the loss of the connection is logged below
                log.warning("nats: %s", describe_error(error))
            return
        self.options["reconnect_time_wait"] = min(_LONGEST_PAUSE, 2 * self.options["reconnect_time_wait"])
        self._cause = describe_error(error)
        if self._was_up:
            self._outage_log.log(self._sentence(self._cause))
        else:
            self._refused.append(error)
            if len(self._refused) >= len(self._urls):
                self._all_refused.set()

    async def _on_disconnect(self) -> None:
        if self.is_closed or not self._was_up:
            return
        self.up.clear()
        self.lost_at = time.monotonic()
        self._cause = ""
        log.warning("nats: connection lost")
        # Answers to earlier requests do not come over the next connection; waiting for them is of no use.
        for answer in list(self._resp_map.values()):
            if not answer.done():
                answer.set_exception(nats.errors.UnexpectedEOF())
                answer.exception()  # nats-py keeps some that are no longer awaited: no warning of those

    async def _on_reconnected(self) -> None:
        log.info("nats: connected again")
        self.options["reconnect_time_wait"] = _SHORTEST_PAUSE
        self.lost_at = None
        self._outage_log.reset()
        self.up.set()
        if self._on_reconnect is not None:
            await self._on_reconnect()

    async def _on_closed(self) -> None:
        # The server closed it, as when credentials are revoked: nats-py does not reconnect then.
        if self._was_up and not self._ours:
            log.error("nats: the server closed the connection and takes no other, ending")
            os.kill(os.getpid(), signal.SIGTERM)


async def connect(
    settings: Settings, name: str, on_reconnect: Callable[[], Awaitable[None]] | None = None, **options: Any
) -> Connection:
    """Connect; a connection that was up once reconnects for as long as it takes.

    Raises `Unavailable` when the first attempt fails, `Rejected` when the next ones would fail too.
    The defaults of nats-py notice a hung server after more than twenty seconds and stop trying after sixty attempts.
    """
    connection = Connection(settings, on_reconnect)
    await connection.begin(name=name, **options)
    return connection
