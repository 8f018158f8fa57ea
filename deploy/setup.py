"""``python -m deploy.setup``: create or update what the services need in NATS, before they start and at every upgrade.

As the user ``bootstrap``, who alone may. Harmless when everything is as it should be.
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
from shared.waiting import until_there

log = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds that servers may take to come up


async def set_up(settings: Settings, patience: float = _PATIENCE, say: Callable[[str], object] = log.warning) -> None:
    """Create or update everything, waiting for NATS; `say` gets what it waits for, in sentences.

    Raises `Unavailable` when NATS does not do as asked.
    """

    async def attempt() -> None:
        nc = await connect(settings, "setup")
        try:
            await bootstrap(nc.jetstream(timeout=10), settings)
        finally:
            await nc.close()

    await until_there(broker(settings), attempt, patience, say)


async def reach_store(
    settings: Settings, patience: float = _PATIENCE, say: Callable[[str], object] = log.warning
) -> None:
    """Wait for the object store, and create the bucket unless it exists. Raises `Unavailable`."""
    store = ObjectStore(settings)
    try:
        await until_there(store.where, store.ensure_bucket, patience, say)
    finally:
        store.close()


def main() -> int:
    """0 when everything is there, 1 when NATS does not do as asked, 2 when a setting is wrong."""
    try:
        settings = Settings.load()
        if not settings.nats_url:
            raise ConfigError("HEARTMULA_NATS_URL is not set; `make run` does all this for the embedded server")
        configure_logging(settings)
        asyncio.run(set_up(settings))
    except HeartMulaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
