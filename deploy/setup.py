"""``python -m deploy.setup``: create or update what the services need in NATS, before they start and at every upgrade.

As the user ``bootstrap``, who alone may. Harmless when everything is as it should be.
"""

import asyncio
import logging
import sys
import time

from shared.errors import ConfigError, HeartMulaError, Unavailable
from shared.process import configure_logging
from shared.settings import Settings
from shared.topology import bootstrap, connect

log = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds that servers may take to come up


async def set_up(settings: Settings, patience: float = _PATIENCE) -> None:
    """Raises `Unavailable` when NATS does not do as asked."""
    deadline = time.monotonic() + patience
    while True:
        try:
            nc = await connect(settings, "setup")
            try:
                await bootstrap(nc.jetstream(timeout=10), settings)
                return
            finally:
                await nc.close()
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            log.info("waiting for NATS: %s", error)
            await asyncio.sleep(1)


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
