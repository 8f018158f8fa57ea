"""Runs a service process: settings, logging, and errors as exit codes."""

import asyncio
import logging
import re
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from shared.errors import ConfigError, DeviceBroken, Unavailable
from shared.schema.base import timestamp
from shared.settings import Settings

_SONG = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}): ")


class _JsonLines(logging.Formatter):
    """A JSON object a line: `time` (RFC 3339), `level`, `logger`, `message`; `job_id`, `role`, `phase` where known."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if found := _SONG.match(fields["message"]):  # messages about a song begin with its id
            fields["job_id"] = found[1]
        for name in ("role", "phase"):
            if (value := getattr(record, name, None)) is not None:
                fields[name] = value
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def add_log_fields(**facts: Callable[[], object]) -> None:
    """Add fields to every log record of this process; each is computed when the record is made."""
    make = logging.getLogRecordFactory()

    def noted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        for name, fact in facts.items():
            setattr(record, name, fact())
        return record

    logging.setLogRecordFactory(noted)


def quiet_libraries() -> None:
    """Silence log lines of libraries about events that this project logs itself."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each repetition of a request
    # nats-py's reader does not know that it reads over TLS; the loop warns of that whenever a server leaves.
    logging.getLogger("asyncio").addFilter(lambda record: "eof_received()" not in record.getMessage())


def configure_logging(settings: Settings) -> None:
    """Log to standard error as the settings say."""
    quiet_libraries()
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
