"""uvicorn around the application: started when NATS and the store are there, stopped without losing anybody."""

import asyncio
import contextlib
import functools
import logging
import resource
import signal
from collections.abc import Iterator
from typing import cast

import stamina.instrumentation
import uvicorn

from services.gateway.api.http_protocol import Connections, HttpConnection
from services.gateway.api.websocket_protocol import Connection
from services.gateway.app import create_app
from services.gateway.container import Gateway
from shared import tracing
from shared.errors import ConfigError
from shared.settings import Settings

_GRACE_SECONDS = 10
MOST_CONNECTIONS = 8192  # at 40 KiB each; 1,000 with ten events a second take 40 % of a core
_OTHER_FILES = 128  # connections to NATS and the store, webhooks, songs that are put into another format


class GatewayServer(uvicorn.Server):
    """Serves one gateway. Whoever runs it decides about signals."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, settings = gateway, gateway.settings
        super().__init__(
            uvicorn.Config(
                gateway.metrics.measured(create_app(gateway)),
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                http=cast("type[asyncio.Protocol]", functools.partial(HttpConnection, Connections(_room()))),
                ws=Connection,
                ws_per_message_deflate=False,
                ws_max_size=64 * 1024,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own ends a clean stop with the signal, as exit code 143."""
        yield

    def stop(self) -> None:
        """Shut down: sockets close with 1012, event streams end, answers under way are finished.

        The second time without patience.
        """
        self._gateway.broadcaster.end_subscriptions()  # event streams would be waited for as answers under way
        self.force_exit = self.should_exit
        self.should_exit = True


def raise_file_limit() -> None:
    """Allow this process as many open files as the system lets it. Every connection is one; 1,024 is a usual limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + _OTHER_FILES if hard == resource.RLIM_INFINITY else hard  # macOS refuses infinity
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _room() -> int:
    """How many connections there may be beside the other files of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(1, min(MOST_CONNECTIONS, soft - _OTHER_FILES))


async def serve(settings: Settings) -> None:
    """Run the gateway until SIGTERM or SIGINT. Raises `ConfigError` or `Unavailable` when it cannot begin."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it has a line for every connection
    raise_file_limit()
    tracing.start("heartmula-gateway")
    stamina.instrumentation.set_on_retry_hooks(())  # a loop that ends without success logs that itself
    gateway = await Gateway.open(settings)
    try:
        server = GatewayServer(gateway)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        try:
            await server.serve()
        except SystemExit:  # uvicorn's way to say that it cannot listen; it has logged why
            raise ConfigError(
                f"cannot listen on {settings.host}:{settings.port}: set HEARTMULA_HOST and HEARTMULA_PORT"
            ) from None
    finally:
        await gateway.close()
