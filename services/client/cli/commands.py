"""The command line ``heartmula``: what people see of the client.

Exit codes: 0 done; 1 the song failed, was cancelled or could not be saved; 2 wrong usage; 3 the service cannot be
reached or does not work; 4 the service refused the request; 130 interrupted.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, cast, get_args

import click
import msgspec

from services.client.cli import output as display
from services.client.cli.output import Display
from services.client.client import DEFAULT_URL, Client
from services.client.errors import ClientError, Refused, as_json
from services.client.responses import Song
from shared.schema.job import Status
from shared.schema.request import AudioFormat, Priority

FAILED, AWAY, REFUSED, INTERRUPTED = 1, 3, 4, 130  # 2 is click's, for wrong usage

Command = TypeVar("Command", bound=Callable[..., Any])

_EPILOG = """Exit codes: 0 done; 1 the song failed, was cancelled or could not be saved; 2 wrong usage; 3 the service
cannot be reached or does not work; 4 the service refused the request; 130 interrupted.

Completion, for bash (zsh and fish likewise): eval "$(_HEARTMULA_COMPLETE=bash_source heartmula)"
"""


@dataclass
class Setup:
    """What options before or after the command say."""

    url: str = DEFAULT_URL
    json: bool = False


def _set(context: click.Context, option: click.Parameter, value: Any) -> None:
    if value:  # else what was said before holds
        setattr(context.ensure_object(Setup), str(option.name), value)


def _common(command: Command) -> Command:
    """Options that may stand before and after the command."""
    url = click.option(
        "--url", metavar="URL", expose_value=False, callback=_set, help="The service. Or set HEARTMULA_URL."
    )
    as_data = click.option("--json", is_flag=True, expose_value=False, callback=_set, help="Answer in JSON.")
    return url(as_data(command))


class _Notes(logging.Handler):
    """Shows what the client logs, above a bar where there is one."""

    def __init__(self, show: Display) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message."""
        self._show.say(self.format(record))


def _run(work: Callable[[Client, Display], Awaitable[int]]) -> NoReturn:
    """Do a command's work and leave with its exit code; errors are told in words."""
    context = click.get_current_context()
    setup = context.ensure_object(Setup)
    show = Display(json=setup.json)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Notes(show)], force=True)

    async def connected() -> int:
        try:
            client = Client(setup.url, _api_key())
        except ValueError as error:
            raise click.UsageError(f"--url, HEARTMULA_URL or HEARTMULA_API_KEY: {error}") from None
        async with client:
            return await work(client, show)

    try:
        code = asyncio.run(connected())
    except ClientError as error:
        if show.json:
            show.emit({"error": as_json(error)})
        show.say(f"error: {_words(error)}")
        code = REFUSED if isinstance(error, Refused) else AWAY
    except BrokenPipeError:  # click's to deal with: the reader has seen enough
        raise
    except OSError as error:
        show.say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        code = FAILED
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _api_key() -> str | None:
    """From the environment or a file that it names: others on a machine see its command lines."""
    if key := os.environ.get("HEARTMULA_API_KEY"):
        return key
    if path := os.environ.get("HEARTMULA_API_KEY_FILE"):
        try:
            return Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"HEARTMULA_API_KEY_FILE: {path} cannot be read: {error}") from None
    return None


def _words(error: ClientError) -> str:
    if error.status is None:
        return f"{error}. Is it running, and is the address right? --url or HEARTMULA_URL names another."
    if error.status == 401:
        return f"{error}. HEARTMULA_API_KEY, or a file that HEARTMULA_API_KEY_FILE names, holds the key."
    wait = f" (try again in {error.retry_after:g} s)" if error.retry_after else ""
    return f"{error.title}: {error}{wait}" if error.title else f"{error}{wait}"


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--url",
    envvar="HEARTMULA_URL",
    default=DEFAULT_URL,
    show_default=True,
    metavar="URL",
    expose_value=False,
    callback=_set,
    help="The service. Or set HEARTMULA_URL.",
)
@click.option("--json", is_flag=True, expose_value=False, callback=_set, help="Answer in JSON.")
@click.version_option(package_name="heartmula-jetstream", prog_name="heartmula")
def cli() -> None:
    """Make songs with a HeartMuLa service.

    \b
    Example:
      heartmula generate --tags "pop, piano" --lyrics-file song.txt --seconds 30
    """


@cli.command()
@_common
@click.option("--lyrics", help="The words; lines such as [Verse] mark sections.")
@click.option("--lyrics-file", type=click.File("rb"), help="A file (UTF-8) that holds them; - is standard input.")
@click.option("--tags", default="", help="Style, comma-separated.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="The longest that the song may be.")
@click.option("--seed", type=int, help="The same seed gives the same song.")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.")
@click.option("--topk", type=int, help="Sample among so many tokens.")
@click.option("--cfg-scale", type=float, help="Guidance; 1 switches it off and is faster.")
@click.option("--format", "form", type=click.Choice(get_args(AudioFormat)), help="As --output ends, or flac.")
@click.option("--title", help="Written into the file.")
@click.option("--priority", type=click.Choice(get_args(Priority)), help="high goes first.")
@click.option("--variants", type=click.IntRange(1, 4), help="So many songs, with seeds in a row.")
@click.option("--webhook-url", metavar="URL", help="Told when the song has ended.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Watch the song and save it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File or folder to save it to.")
def generate(
    lyrics: str | None,
    lyrics_file: BinaryIO | None,
    seconds: float | None,
    form: AudioFormat | None,
    wait: bool,
    output: Path | None,
    **wanted: Any,
) -> None:
    """Ask for a song, watch it being made, and save it.

    \b
    Examples:
      heartmula generate --tags "pop, piano" --lyrics-file song.txt --seconds 30
      fortune | heartmula generate --lyrics-file - --output song.mp3
    """
    words = _lyrics(lyrics, lyrics_file)
    if output is not None:
        if not wait:
            raise click.UsageError("--output needs --wait; `heartmula download` saves the song later.")
        if (wanted["variants"] or 1) > 1 and not output.is_dir():
            raise click.UsageError("--output has to be a folder where several songs are asked for.")
        form = _format(output, form)
    duration = None if seconds is None else round(seconds * 1000)

    async def work(client: Client, show: Display) -> int:
        try:
            accepted = await client.generate(words, max_duration_ms=duration, format=form, **wanted)
        except asyncio.CancelledError:
            show.say("interrupted before the service answered: it may have taken the song, `heartmula list` tells")
            raise
        ids = [each.job_id for each in accepted.variants or [accepted]]
        if not wait:
            show.emit(accepted) if show.json else show.show(*ids)
            return 0
        show.say(f"song {' '.join(ids)}")
        saved = []
        for song in await _follow(client, show, ids, quiet=True):
            path = await _save(client, show, song.job_id, output) if song.status == "completed" else None
            saved.append(path is not None)
            if show.json:
                show.emit(_as_dict(song) | ({"path": str(path)} if path else {}))
        return 0 if all(saved) else FAILED

    _run(work)


@cli.command()
@_common
@click.argument("song")
def watch(song: str) -> None:
    """Watch a song until it has ended. With --json, one event a line.

    \b
    Example:
      heartmula watch 2f0c…
    """

    async def work(client: Client, show: Display) -> int:
        (ended,) = await _follow(client, show, [song], quiet=False)
        return 0 if ended.status == "completed" else FAILED

    _run(work)


@cli.command()
@_common
@click.argument("song")
def status(song: str) -> None:
    """Show how a song is coming along. Exits with 1 if it failed or was cancelled.

    \b
    Example:
      heartmula status 2f0c… --json
    """

    async def work(client: Client, show: Display) -> int:
        found = await client.status(song)
        show.emit(found) if show.json else show.show(display.song_table(found))
        return FAILED if found.ended and found.status != "completed" else 0

    _run(work)


@cli.command("list")
@_common
@click.option("--limit", type=click.IntRange(min=1), help="Songs a page.")
@click.option("--cursor", help="Where the page begins: what the page before said.")
@click.option("--status", "state", type=click.Choice(get_args(Status)), help="Only songs in this state.")
def list_songs(limit: int | None, cursor: str | None, state: Status | None) -> None:
    """List songs.

    \b
    Example:
      heartmula list --limit 10
    """

    async def work(client: Client, show: Display) -> int:
        page = await client.songs(limit, cursor, state)
        if show.json:
            show.emit(page)
            return 0
        if page.songs:
            show.show(display.songs_table(page))
        else:
            show.say("no songs")
        if page.next:
            show.say(f"more: --cursor {page.next}")
        return 0

    _run(work)


@cli.command()
@_common
@click.argument("song")
def cancel(song: str) -> None:
    """Cancel a song, waiting or running.

    \b
    Example:
      heartmula cancel 2f0c…
    """

    async def work(client: Client, show: Display) -> int:
        became = await client.cancel(song)
        if show.json:
            show.emit({"job_id": song, "status": became})
        else:
            show.say(became)
        return 0

    _run(work)


@cli.command()
@_common
@click.argument("song")
def delete(song: str) -> None:
    """Remove a song that has ended, its audio with it.

    \b
    Example:
      heartmula delete 2f0c…
    """

    async def work(client: Client, show: Display) -> int:
        await client.forget(song)
        if show.json:
            show.emit({"job_id": song})
        else:
            show.say("deleted")
        return 0

    _run(work)


@cli.command()
@_common
@click.argument("song")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File or folder to save it to.")
@click.option("--format", "form", type=click.Choice(get_args(AudioFormat)), help="As --output ends, or as it was made.")
def download(song: str, output: Path | None, form: AudioFormat | None) -> None:
    """Save a finished song; what an interrupted download left is gone on with.

    \b
    Example:
      heartmula download 2f0c… --output song.mp3
    """
    if output is not None:
        form = _format(output, form)

    async def work(client: Client, show: Display) -> int:
        saved = await _save(client, show, song, output, form)
        if show.json:
            show.emit({"job_id": song, "path": str(saved)})
        return 0

    _run(work)


@cli.command()
@_common
def gpu() -> None:
    """Show every device: its memory, who holds it, who works there, and the queues.

    \b
    Example:
      heartmula gpu
    """

    async def work(client: Client, show: Display) -> int:
        found = await client.gpus()
        show.emit(found) if show.json else show.show(*display.devices_view(found))
        return 0

    _run(work)


@cli.command()
@_common
def models() -> None:
    """Show the models of all workers, and what lies on their devices.

    \b
    Example:
      heartmula models
    """

    async def work(client: Client, show: Display) -> int:
        found = await client.gpus()
        served = display.models_of(found)
        if show.json:
            show.emit({"models": served, "problems": found.problems})
            return 0
        if served:
            show.show(display.models_table(served))
        for problem in found.problems:
            show.say(f"problem: {problem}")
        return 0

    _run(work)


def _lyrics(text: str | None, file: BinaryIO | None) -> str:
    if (text is None) == (file is None):
        raise click.UsageError("Give either --lyrics or --lyrics-file (- is standard input).")
    if file is None:
        return text or ""
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise click.BadParameter("the file is not UTF-8", param_hint="--lyrics-file") from None


def _format(output: Path, form: AudioFormat | None) -> AudioFormat | None:
    """The format of the file that is asked for. Whether it can be written is seen before a song is made for it."""
    _require_folder(output)
    ending = output.suffix.removeprefix(".").lower()
    if output.is_dir() or ending not in get_args(AudioFormat):
        return form
    if form is not None and form != ending:
        raise click.UsageError(f"--output ends with .{ending}, but --format says {form}.")
    return cast("AudioFormat", ending)


def _require_folder(output: Path) -> None:
    if not output.is_dir() and not output.parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.parent}", param_hint="--output")


async def _follow(client: Client, show: Display, ids: list[str], *, quiet: bool) -> list[Song]:
    """Show the events of songs until all have ended; returns their states then. Tells who interrupts how to go on.

    `quiet` prints no event in JSON.
    """

    async def one(job_id: str, bar: display.SongBar) -> Song:
        async with aclosing(client.watch(job_id)) as events:
            async for event in events:
                if show.json and not quiet:
                    show.emit(event)
                bar.update(event)
        return await client.status(job_id)

    try:
        with show.song_bars(len(ids)) as bars:
            songs = await asyncio.gather(*(one(job_id, bar) for job_id, bar in zip(ids, bars, strict=True)))
    except asyncio.CancelledError:
        again = "; ".join(f"heartmula watch {job_id}" for job_id in ids)
        show.say(f"the song goes on without you. To see it again: {again}")
        raise
    for song in songs:
        if song.status == "failed":
            show.say(f"the song failed: {song.error or 'the log of the worker says why'}")
        elif song.status != "completed":
            show.say(f"the song was {song.status}")
    return songs


async def _save(
    client: Client, show: Display, job_id: str, output: Path | None, form: AudioFormat | None = None
) -> Path:
    try:
        with show.file_bar() as bar:
            saved = await client.download(job_id, output, format=form, on_progress=bar.update)
    except asyncio.CancelledError:
        show.say(f"the song is made. To go on with the download: heartmula download {job_id}")
        raise
    if not show.json:
        show.show(str(saved))
    return saved


def _as_dict(song: Song) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(song)
    return found


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        code = cli.main(prog_name="heartmula", standalone_mode=False)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(code)
