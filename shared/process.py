"""The frame of a service process: settings, logging, and errors as exit codes."""

import asyncio
import logging
import re
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from shared.errors import ConfigError, DeviceBroken, Unavailable
from shared.messages import timestamp
from shared.settings import Settings

_SONG = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}): ")


class _JsonLines(logging.Formatter):
    """A JSON object a line: `time` (RFC 3339), `level`, `logger`, `message`, `job_id` where it is about a song."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if found := _SONG.match(said["message"]):  # what is said of a song begins with its id
            said["job_id"] = found[1]
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(said).decode()


def configure_logging(settings: Settings) -> None:
    """Log to standard error as the settings say."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    if settings.log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_JsonLines())


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
        configure_logging(settings)
        runner(serve(settings))
    except (ConfigError, DeviceBroken, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:  # while waiting for the servers
        return 130
    return 0
