"""The commands of ``heartmula``, one function each."""

import sys
from pathlib import Path
from typing import NoReturn, get_args

import click

from heartmula_client.cli.arguments import choose_format
from heartmula_client.cli.extend import extend, tree
from heartmula_client.cli.follow import follow, save
from heartmula_client.cli.generate import generate
from heartmula_client.cli.mcp import mcp
from heartmula_client.cli.output import Display
from heartmula_client.cli.play import play_songs, playing
from heartmula_client.cli.player import player_option
from heartmula_client.cli.recordings import find, of_either, recordings, upload
from heartmula_client.cli.runtime import ExitStatus, connected, connection_options, remember
from heartmula_client.cli.tables import devices_view, models_of, models_table, recording_table, song_table, songs_table
from heartmula_client.client import AsyncClient
from heartmula_client.connection import DEFAULT_URL
from heartmula_client.responses import Song
from heartmula_client.schema import AudioFormat, Status

_EPILOG = """Exit codes: 0 done; 1 the song failed, was cancelled or could not be saved or
played; 2 wrong usage; 3 the service cannot be reached or does not work; 4 the service refused the
request; 130 interrupted.

Completion, for bash (zsh and fish likewise): eval "$(_HEARTMULA_COMPLETE=bash_source heartmula)"
"""


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--url",
    envvar="HEARTMULA_URL",
    default=DEFAULT_URL,
    show_default=True,
    metavar="URL",
    expose_value=False,
    callback=remember,
    help="The service. Or set HEARTMULA_URL.",
)
@click.option("--json", is_flag=True, expose_value=False, callback=remember, help="Answer in JSON.")
@click.version_option(package_name="heartmula-client", prog_name="heartmula")
def cli() -> None:
    """Make songs with a HeartMuLa service.

    \b
    Example:
      heartmula generate --tags "pop, piano" --lyrics-file song.txt --seconds 30
    """


for command in (generate, extend, tree, upload, recordings, mcp):
    cli.add_command(command)


@cli.command()
@connection_options
@click.argument("song")
@connected
async def watch(client: AsyncClient, display: Display, song: str) -> ExitStatus:
    """Watch a song until it has ended. With --json, print one event per line.

    \b
    Example:
      heartmula watch 2f0c…
    """
    (ended,) = await follow(client, display, [song], print_events=True)
    return ExitStatus.OK if ended.status == "completed" else ExitStatus.FAILED


@cli.command()
@connection_options
@click.argument("song")
@click.option("--from", "start", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="Begin there.")
@click.option("--format", "form", type=click.Choice(get_args(AudioFormat)), help="As --output ends, or flac.")
@player_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Save it as well: file, folder or - (stdout).")
@connected
async def play(
    client: AsyncClient,
    display: Display,
    song: str,
    start: float,
    form: AudioFormat | None,
    player: str | None,
    output: Path | None,
) -> ExitStatus:
    """Play a song while it is made, or afterwards.

    The audio goes to a player: mpv, ffplay, cvlc or SoX's play, whichever is there. Without one the song is saved, in a
    file that can be played while it grows.

    \b
    Examples:
      heartmula play 2f0c…
      heartmula play 2f0c… --from 60 --player "mpv --volume=50 -"
      heartmula play 2f0c… --output - | flac -t -
    """
    return await play_songs(client, display, [song], playing(form, output, player, start))


@cli.command()
@connection_options
@click.argument("song")
@connected
async def status(client: AsyncClient, display: Display, song: str) -> ExitStatus:
    """Show the state of a song or recording. Exits with 1 if it failed or was cancelled.

    \b
    Example:
      heartmula status 2f0c… --json
    """
    found = await find(client, song)
    table = song_table(found) if isinstance(found, Song) else recording_table(found)
    display.emit(found) if display.json else display.show(table)
    return ExitStatus.FAILED if found.ended and found.status not in ("completed", "ready") else ExitStatus.OK


@cli.command("list")
@connection_options
@click.option("--limit", type=click.IntRange(min=1), help="Songs per page.")
@click.option("--cursor", help="Start of the page, as the previous page printed it.")
@click.option("--status", "state", type=click.Choice(get_args(Status)), help="Only songs in this state.")
@click.option("--parent", metavar="SONG", help="Only songs that go on from this song or recording.")
@connected
async def list_songs(
    client: AsyncClient,
    display: Display,
    limit: int | None,
    cursor: str | None,
    state: Status | None,
    parent: str | None,
) -> ExitStatus:
    """List songs.

    \b
    Example:
      heartmula list --limit 10
    """
    page = await client.songs(limit, cursor, state, parent)
    if display.json:
        display.emit(page)
        return ExitStatus.OK
    if page.songs:
        display.show(songs_table(page))
    else:
        display.say("no songs")
    if page.next:
        display.say(f"more: --cursor {page.next}")
    return ExitStatus.OK


@cli.command()
@connection_options
@click.argument("song")
@connected
async def cancel(client: AsyncClient, display: Display, song: str) -> ExitStatus:
    """Cancel a waiting or running song.

    \b
    Example:
      heartmula cancel 2f0c…
    """
    became = await client.cancel(song)
    if display.json:
        display.emit({"job_id": song, "status": became})
    else:
        display.say(became)
    return ExitStatus.OK


@cli.command()
@connection_options
@click.argument("song")
@connected
async def delete(client: AsyncClient, display: Display, song: str) -> ExitStatus:
    """Delete a song that has ended, or a recording, and its audio.

    \b
    Example:
      heartmula delete 2f0c…
    """
    await of_either(client.forget(song), lambda: client.delete_recording(song))
    if display.json:
        display.emit({"job_id": song})
    else:
        display.say("deleted")
    return ExitStatus.OK


@cli.command()
@connection_options
@click.argument("song")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File or folder to save it to.")
@click.option("--format", "form", type=click.Choice(get_args(AudioFormat)), help="As --output ends, or as it was made.")
@connected
async def download(
    client: AsyncClient, display: Display, song: str, output: Path | None, form: AudioFormat | None
) -> ExitStatus:
    """Save a finished song, or a recording. An interrupted download is resumed.

    \b
    Example:
      heartmula download 2f0c… --output song.mp3
    """
    if output is not None:
        form = choose_format(output, form)
    saved = await save(client, display, song, output, form)
    if display.json:
        display.emit({"job_id": song, "path": str(saved)})
    return ExitStatus.OK


@cli.command()
@connection_options
@connected
async def gpu(client: AsyncClient, display: Display) -> ExitStatus:
    """Show every device with its memory, its holder and its workers, and the queues.

    \b
    Example:
      heartmula gpu
    """
    found = await client.gpus()
    display.emit(found) if display.json else display.show(*devices_view(found))
    return ExitStatus.OK


@cli.command()
@connection_options
@connected
async def models(client: AsyncClient, display: Display) -> ExitStatus:
    """Show the models of all workers, and what is loaded on their devices.

    \b
    Example:
      heartmula models
    """
    found = await client.gpus()
    served = models_of(found)
    if display.json:
        display.emit({"models": served, "problems": found.problems})
        return ExitStatus.OK
    if served:
        display.show(models_table(served))
    for problem in found.problems:
        display.say(f"problem: {problem}")
    return ExitStatus.OK


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        code = cli.main(prog_name="heartmula", standalone_mode=False)
    except click.Abort:
        sys.exit(ExitStatus.INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(code)
