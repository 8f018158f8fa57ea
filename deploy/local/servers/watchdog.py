"""Starts an embedded server again that lives and takes no writes any more, once its disk has room.

After a full disk neither nats-server 2.15 nor SeaweedFS 4.48 heals by itself, and only a new start helps.
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
import nats.errors

from deploy.local.servers.embedded import NatsServer, S3Server, Server
from shared.errors import HeartMulaError
from shared.settings import Settings
from shared.storage.objects import ObjectStore

_EVERY = 5.0  # seconds between two looks
_PATIENCE = 10.0  # seconds for an answer
_TIMES = 3  # looks in a row that have to find a server stuck
_PAUSES = (30.0, 900.0)  # seconds after a restart in which there is no other: at first, and at most
_ROOM, _ROOM_SHARE = 32 << 20, 0.02  # bytes, and of the volume: SeaweedFS writes nothing on the last hundredth
_HEALTH = "$SYS.REQ.SERVER.PING.HEALTHZ"


async def nats_trouble(server: NatsServer) -> str | None:
    """What the server says of its streams, when it cannot write to one; None when all is well or it is away."""
    try:
        client = await nats.connect(
            server.url_of("operator").replace("//operator:", "//system:"),
            allow_reconnect=False,
            connect_timeout=2,
            inbox_prefix=b"_INBOX_system",
            error_cb=_ignore,
        )
    except (OSError, TimeoutError, nats.errors.Error):
        return None
    try:
        answer = await client.request(_HEALTH, b'{"details": true}', timeout=_PATIENCE)
        errors = json.loads(answer.data).get("data", {}).get("errors") or []
        return next((str(error.get("error")) for error in errors), None)
    except (OSError, TimeoutError, nats.errors.Error, ValueError):
        return None
    finally:
        await client.close()


class StoreProbe:
    """Writes to an embedded store."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        self._store = ObjectStore(
            Settings(
                s3_endpoint=server.url,
                s3_access_key=server.access_key,
                s3_secret_key=server.secret_key,
                s3_bucket=bucket,
            )
        )

    async def trouble(self) -> str | None:
        """Why the store takes no writes though it answers; None when all is well, or it does not answer."""
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._store.ping()
        except (HeartMulaError, TimeoutError):
            return None
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._store.prove_writing()
        except HeartMulaError as error:
            return str(error)
        except TimeoutError:
            return "it does not finish a write"
        return None


class Healer:
    """Looks after embedded servers, one at least, until it is cancelled."""

    def __init__(
        self, servers: Sequence[Server], bucket: str, restart: Callable[[str], Awaitable[None]], every: float = _EVERY
    ) -> None:
        """`restart` stops and starts the server of a name; `every` is in seconds between two looks."""
        self._servers, self._bucket, self._restart, self._every = servers, bucket, restart, every

    async def run(self) -> NoReturn:
        """Never returns."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                if isinstance(server, NatsServer):
                    tasks.create_task(self._look_after(server, functools.partial(nats_trouble, server)))
                elif isinstance(server, S3Server):
                    tasks.create_task(self._look_after(server, StoreProbe(server, self._bucket).trouble))
        raise AssertionError("looking after servers has no end")

    async def _look_after(self, server: Server, look: Callable[[], Awaitable[str | None]]) -> None:
        stuck, pause, said = 0, _PAUSES[0], False
        while True:
            await asyncio.sleep(self._every)
            reason = await look()
            if reason is None:
                stuck, said = 0, False
                continue
            stuck += 1
            if stuck < _TIMES:
                continue
            if not said:
                _say(f"{server.name} takes no writes: {reason}")
                said = True
            if not has_room(server):
                continue
            _say(f"starting {server.name} again: its disk has room, and it takes no writes all the same")
            try:
                await self._restart(server.name)
            except HeartMulaError as error:
                _say(f"{server.name} could not be started again: {error}")
            stuck, said = 0, False
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])


def has_room(server: Server) -> bool:
    """Whether the volume of a server's data has room for more than a moment."""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(server.data_dir)
        return usage.free > max(_ROOM, _ROOM_SHARE * usage.total)
    return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _ignore(error: Exception) -> None:
    """A server that is just being started again refuses connections."""
