"""``python -m deploy.setup``: create or update the streams and buckets that the services need in NATS.

It runs before the services start and at every upgrade, as the user ``bootstrap``, the only one with the rights. Running
it again changes nothing.
"""

import asyncio
import logging
import sys
from collections.abc import Callable

from shared.entrypoint import configure_logging
from shared.errors import ConfigError, HeartMulaError
from shared.nats.connection import broker, connect
from shared.nats.streams import bootstrap
from shared.settings import Settings
from shared.storage.objects import ObjectStore
from shared.waiting import wait_until_available

log = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds within which the servers have to answer


async def set_up(settings: Settings, patience: float = _PATIENCE, say: Callable[[str], object] = log.warning) -> None:
    """Create or update all streams and buckets, waiting for NATS up to `patience` seconds.

    `say` is called with sentences about what it waits for. Raises `Unavailable` when NATS does not answer or refuses.
    """

    async def attempt() -> None:
        nc = await connect(settings, "setup")
        try:
            await bootstrap(nc.jetstream(timeout=10), settings)
        finally:
            await nc.close()

    await wait_until_available(broker(settings), attempt, patience, say)


async def reach_store(
    settings: Settings, patience: float = _PATIENCE, say: Callable[[str], object] = log.warning
) -> None:
    """Wait for the object store, and create the bucket unless it exists. Raises `Unavailable`."""
    store = ObjectStore(settings)
    try:
        await wait_until_available(store.where, store.ensure_bucket, patience, say)
    finally:
        store.close()


def main() -> int:
    """Set up NATS; returns the exit code: 0 done, 1 NATS does not answer or refuses, 2 a setting is wrong."""
    try:
        settings = Settings.load()
        if not settings.nats_url:
            raise ConfigError(
                "HEARTMULA_NATS_URL is not set; for the embedded server, `make run` does this setup itself"
            )
        configure_logging(settings)
        asyncio.run(set_up(settings))
    except HeartMulaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
