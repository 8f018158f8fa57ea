"""Run a command: connect the client, show what it logs, and map errors to exit codes."""

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import click

from heartmula_client.cli.output import Display
from heartmula_client.client import AsyncClient
from heartmula_client.connection import DEFAULT_URL
from heartmula_client.errors import ClientError, Refused, as_json

P = ParamSpec("P")
Command = TypeVar("Command", bound=Callable[..., Any])


class ExitStatus(IntEnum):
    """What the command line exits with. Scripts rely on these numbers."""

    OK = 0
    FAILED = 1  # the song failed, was cancelled or could not be saved
    USAGE = 2  # wrong usage; click exits with it
    UNAVAILABLE = 3  # the service cannot be reached or does not work
    REFUSED = 4  # the service refused the request
    INTERRUPTED = 130  # Ctrl-C, as shells report it


@dataclass
class Connection:
    """The service's address and the form of the output, as options before or after the command set them."""

    url: str = DEFAULT_URL
    json: bool = False


def remember(context: click.Context, option: click.Parameter, value: Any) -> None:
    """Keep an option's value in the `Connection` of `context`, unless the option is not given here."""
    if value:
        setattr(context.ensure_object(Connection), str(option.name), value)


def connection_options(command: Command) -> Command:
    """Add the options that may stand before and after the command."""
    as_data = click.option("--json", is_flag=True, expose_value=False, callback=remember, help="Answer in JSON.")
    return url_option(as_data(command))


def url_option(command: Command) -> Command:
    """Add the option for the service's address, which may stand before and after the command."""
    option = click.option(
        "--url", metavar="URL", expose_value=False, callback=remember, help="The service. Or set HEARTMULA_URL."
    )
    return option(command)


def connected(
    command: Callable[Concatenate[AsyncClient, Display, P], Awaitable[ExitStatus]],
) -> Callable[P, NoReturn]:
    """Turn an asynchronous command into one for click: it is handed a client and a display, then the process exits.

    Errors are shown in words (with ``--json`` as JSON too) and end in the `ExitStatus` that stands for them.
    """

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> NoReturn:
        connection = click.get_current_context().ensure_object(Connection)
        display = Display(json=connection.json)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_LogHandler(display)], force=True)

        async def connect_and_run() -> ExitStatus:
            async with _client(connection.url) as client:
                return await command(client, display, *args, **options)

        sys.exit(_exit_status(display, connect_and_run))

    return run


def _exit_status(display: Display, work: Callable[[], Coroutine[None, None, ExitStatus]]) -> ExitStatus:
    try:
        return asyncio.run(work())
    except ClientError as error:
        if display.json:
            display.emit({"error": as_json(error)})
        display.say(f"error: {_explain(error)}")
        return ExitStatus.REFUSED if isinstance(error, Refused) else ExitStatus.UNAVAILABLE
    except BrokenPipeError:  # the reader of the output has closed it: click handles that
        raise
    except OSError as error:
        display.say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return ExitStatus.FAILED
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED


def _client(url: str) -> AsyncClient:
    try:
        return AsyncClient(url, _api_key())
    except ValueError as error:
        raise click.UsageError(f"--url, HEARTMULA_URL or HEARTMULA_API_KEY: {error}") from None


def _api_key() -> str | None:
    """Read the API key from the environment or from the file that it names.

    There is no option for it, because other users of a machine see the command lines of its processes.
    """
    if key := os.environ.get("HEARTMULA_API_KEY"):
        return key
    if path := os.environ.get("HEARTMULA_API_KEY_FILE"):
        try:
            return Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"HEARTMULA_API_KEY_FILE: {path} cannot be read: {error}") from None
    return None


def _explain(error: ClientError) -> str:
    """Put an error into words that say what to do next."""
    if error.status is None:
        return f"{error}. Is it running, and is the address right? --url or HEARTMULA_URL names another."
    if error.status == 401:
        return f"{error}. HEARTMULA_API_KEY, or a file that HEARTMULA_API_KEY_FILE names, holds the key."
    wait = f" (try again in {error.retry_after:g} s)" if error.retry_after else ""
    return f"{error.title}: {error}{wait}" if error.title else f"{error}{wait}"


class _LogHandler(logging.Handler):
    """A log handler that shows what the client logs, above a progress bar where there is one."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message."""
        self._display.say(self.format(record))
