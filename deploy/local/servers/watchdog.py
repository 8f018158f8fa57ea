"""Watchdog that restarts an embedded server which runs but no longer accepts writes, once its disk has free space.

After a full disk neither nats-server 2.15 nor SeaweedFS 4.48 recovers without a restart.
"""

import asyncio
import contextlib
import functools
import json
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

import nats

from deploy.local.servers.embedded import NatsServer, S3Server, Server
from shared.errors import HeartMulaError, NotFound, Unavailable
from shared.nats.errors import nats_errors
from shared.settings import Settings
from shared.storage.objects import ObjectStore

_INTERVAL = 5.0  # seconds between two checks
_TIMEOUT = 10.0  # seconds for an answer
_FAILURES = 3  # failed checks in a row before a restart
_DELAYS = (30.0, 900.0)  # seconds after a restart before the next check: the first, doubled up to the second
_MIN_FREE, _MIN_FREE_SHARE = 32 << 20, 0.02  # bytes, and share of the volume, of which SeaweedFS needs 1 % free
_HEALTH = "$SYS.REQ.SERVER.PING.HEALTHZ"


async def nats_problem(server: NatsServer) -> str | None:
    """Return the server's error of a stream that it cannot write to; None when there is none or it does not answer."""
    try:
        with nats_errors("no answer"):
            client = await nats.connect(
                server.url_of("operator").replace("//operator:", "//system:"),
                allow_reconnect=False,
                connect_timeout=2,
                inbox_prefix=b"_INBOX_system",
                error_cb=_ignore,
            )
            try:
                answer = await client.request(_HEALTH, b'{"details": true}', timeout=_TIMEOUT)
            finally:
                await client.close()
        errors = json.loads(answer.data).get("data", {}).get("errors") or []
    except (Unavailable, NotFound, ValueError):
        return None
    return next((str(error.get("error")) for error in errors), None)


class StoreProbe:
    """Checks whether an embedded object store accepts writes."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        self._store = ObjectStore(
            Settings(
                s3_endpoint=server.url,
                s3_access_key=server.access_key,
                s3_secret_key=server.secret_key,
                s3_bucket=bucket,
            )
        )

    async def problem(self) -> str | None:
        """Return why the store accepts no writes although it answers; None when it does, or does not answer."""
        try:
            async with asyncio.timeout(_TIMEOUT):
                await self._store.ping()
        except (HeartMulaError, TimeoutError):
            return None
        try:
            async with asyncio.timeout(_TIMEOUT):
                await self._store.prove_writing()
        except HeartMulaError as error:
            return str(error)
        except TimeoutError:
            return "a write does not finish"
        return None


class Watchdog:
    """Watches one or more embedded servers, and restarts those that accept no writes."""

    def __init__(
        self,
        servers: Sequence[Server],
        bucket: str,
        restart: Callable[[str], Awaitable[None]],
        every: float = _INTERVAL,
    ) -> None:
        """`restart` stops and starts the server with a name; `every` is the seconds between two checks."""
        self._servers, self._bucket, self._restart, self._every = servers, bucket, restart, every

    async def run(self) -> NoReturn:
        """Watch all servers until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                if isinstance(server, NatsServer):
                    tasks.create_task(self._watch_server(server, functools.partial(nats_problem, server)))
                elif isinstance(server, S3Server):
                    tasks.create_task(self._watch_server(server, StoreProbe(server, self._bucket).problem))
        raise AssertionError("watching a server does not end")

    async def _watch_server(self, server: Server, check: Callable[[], Awaitable[str | None]]) -> None:
        failures, delay, reported = 0, _DELAYS[0], False
        while True:
            await asyncio.sleep(self._every)
            reason = await check()
            if reason is None:
                failures, reported = 0, False
                continue
            failures += 1
            if failures < _FAILURES:
                continue
            if not reported:
                _say(f"{server.name} accepts no writes: {reason}")
                reported = True
            if not has_free_space(server):
                continue
            _say(f"starting {server.name} again: its disk has free space, and it still accepts no writes")
            try:
                await self._restart(server.name)
            except HeartMulaError as error:
                _say(f"{server.name} could not be started again: {error}")
            failures, reported = 0, False
            await asyncio.sleep(delay)
            delay = min(2 * delay, _DELAYS[1])


def has_free_space(server: Server) -> bool:
    """Whether the volume of a server's data has enough free space for a restart to help."""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(server.data_dir)
        return usage.free > max(_MIN_FREE, _MIN_FREE_SHARE * usage.total)
    return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _ignore(error: Exception) -> None:
    """Ignore an error: a server that is being restarted refuses connections."""
