"""The HTTP server around the application: uvicorn, started once NATS and the store answer, stopped gracefully."""

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
from services.gateway.api.websocket_protocol import WebSocketConnection
from services.gateway.app import create_app
from services.gateway.container import Container
from shared import tracing
from shared.errors import ConfigError
from shared.settings import Settings

_GRACE_SECONDS = 10
MOST_CONNECTIONS = 8192  # at 40 KiB each; 1,000 with ten events a second take 40 % of a core
_OTHER_FILES = 128  # connections to NATS and the store, webhooks, conversions to another format


class GatewayServer(uvicorn.Server):
    """uvicorn's server for one gateway. It installs no signal handlers: the caller does."""

    def __init__(self, container: Container) -> None:
        self._broadcaster, self._streams, self._uploads = container.broadcaster, container.streams, container.uploads
        settings = container.settings
        protocol = functools.partial(HttpConnection, Connections(_most_connections()))
        super().__init__(
            uvicorn.Config(
                container.metrics.measured(create_app(container)),
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                http=cast("type[asyncio.Protocol]", protocol),
                ws=WebSocketConnection,
                ws_per_message_deflate=False,
                ws_max_size=64 * 1024,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn's own method ends a clean stop with the signal, as exit code 143."""
        yield

    def stop(self) -> None:
        """Shut down: websockets close with 1012, event streams end, streams of audio are cut, uploads are refused.

        Other responses are finished.
        A second call does not wait for them.
        """
        # uvicorn would wait for these as for other responses.
        self._streams.close()
        self._uploads.close()
        self._broadcaster.end_subscriptions()
        self.force_exit = self.should_exit
        self.should_exit = True


def raise_file_limit() -> None:
    """Raise the limit of open files as far as the system allows. Every connection is one; 1,024 is a usual limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + _OTHER_FILES if hard == resource.RLIM_INFINITY else hard  # macOS refuses infinity
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _most_connections() -> int:
    """The number of connections that there is room for beside the other files of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(1, min(MOST_CONNECTIONS, soft - _OTHER_FILES))


async def serve(settings: Settings) -> None:
    """Run the gateway until SIGTERM or SIGINT. Raises `ConfigError` or `Unavailable` when it cannot begin."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it logs a line for every connection
    raise_file_limit()
    tracing.start("heartmula-gateway")
    stamina.instrumentation.set_on_retry_hooks(())  # a loop that ends without success logs that itself
    container = await Container.open(settings)
    try:
        server = GatewayServer(container)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        try:
            await server.serve()
        except SystemExit:  # uvicorn exits like this when it cannot listen; it has logged why
            raise ConfigError(
                f"cannot listen on {settings.host}:{settings.port}: set HEARTMULA_HOST and HEARTMULA_PORT"
            ) from None
    finally:
        await container.close()
