"""The frame of a service process: settings, logging, and errors as exit codes."""

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from shared.errors import ConfigError, DeviceBroken, Unavailable
from shared.settings import Settings


def run(
    serve: Callable[[Settings], Coroutine[Any, Any, None]],
    runner: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run,
) -> int:
    """Run a service to its end.

    Returns the exit code: 2 for a wrong setting, 1 when a server does not come up or the device is broken.
    """
    try:
        settings = Settings.load()
        settings.require_servers()
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
        )
        runner(serve(settings))
    except (ConfigError, DeviceBroken, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:  # while waiting for the servers
        return 130
    return 0
