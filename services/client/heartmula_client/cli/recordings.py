"""The commands for recordings: to upload one, and to list them; and what other commands do with the id of one."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar, get_args

import click

from heartmula_client.cli.output import Display
from heartmula_client.cli.runtime import ExitStatus, connected, connection_options
from heartmula_client.cli.tables import recordings_table
from heartmula_client.client import AsyncClient
from heartmula_client.errors import Refused, UnknownSong
from heartmula_client.recordings import title_of
from heartmula_client.responses import Event, Recording, Song
from heartmula_client.schema import RecordingStatus

T = TypeVar("T")
U = TypeVar("U")


@click.command()
@connection_options
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--title", help="Its name in lists; the file's name if left out.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until songs can go on from it.")
@connected
async def upload(client: AsyncClient, display: Display, file: Path, title: str | None, wait: bool) -> ExitStatus:
    """Upload a recording for songs to go on from: FLAC, WAV, MP3 or Ogg. Prints its id.

    The same file again is the same recording.

    \b
    Examples:
      heartmula upload demo.wav
      heartmula extend "$(heartmula upload demo.wav)" --at 0:20 --lyrics-file song.txt
    """
    found = await send(client, display, read_file(file), title, wait=wait)
    display.emit(found) if display.json else display.show(found.recording_id)
    return ExitStatus.FAILED if found.status == "failed" else ExitStatus.OK


@click.command()
@connection_options
@click.option("--limit", type=click.IntRange(min=1), help="Recordings per page.")
@click.option("--cursor", help="Start of the page, as the previous page printed it.")
@click.option("--status", "state", type=click.Choice(get_args(RecordingStatus)), help="Only recordings in this state.")
@connected
async def recordings(
    client: AsyncClient, display: Display, limit: int | None, cursor: str | None, state: RecordingStatus | None
) -> ExitStatus:
    """List recordings.

    \b
    Example:
      heartmula recordings
    """
    page = await client.recordings(limit, cursor, state)
    if display.json:
        display.emit(page)
        return ExitStatus.OK
    if page.recordings:
        display.show(recordings_table(page))
    else:
        display.say("no recordings")
    if page.next:
        display.say(f"more: --cursor {page.next}")
    return ExitStatus.OK


def read_file(path: Path) -> Path:
    """Return the path. Raises `UsageError` where an upload cannot be read from it, again if need be."""
    if not path.is_file():
        raise click.UsageError(f"{path} is no file: save the recording in one first, for an upload may be repeated.")
    return path


async def send(
    client: AsyncClient, display: Display, file: Path, title: str | None = None, *, wait: bool = True
) -> Recording:
    """Upload a file, and wait for its end unless told otherwise; returns the recording's latest state.

    Raises a `ClientError`, and `OSError` where the file cannot be read.
    """
    with display.file_bar("uploading") as bar:
        named = title_of(file) if title is None else title
        found = await client.upload(file, title=named, on_progress=bar.update)
    if wait and not found.ended:
        found = await _follow(client, display, found)
    if found.status == "failed":
        display.say(f"the recording failed: {found.error or 'the log of the worker says why'}")
    return found


async def _follow(client: AsyncClient, display: Display, found: Recording) -> Recording:
    try:
        with display.song_bars(1) as (bar,):
            async with aclosing(client.watch_recording(found.recording_id)) as states:
                async for found in states:
                    job_id, status = found.recording_id, found.status
                    bar.update(Event(kind="snapshot", job_id=job_id, status=status, progress=found.progress))
    except asyncio.CancelledError:
        display.say(f"the recording {found.recording_id} is encoded without you; see `heartmula recordings`")
        raise
    return found


async def find(client: AsyncClient, name: str) -> Song | Recording:
    """Return the song or the recording with this id. Raises as `of_either`."""
    return await of_either(client.song(name), lambda: client.recording(name))


async def of_either(song: Awaitable[T], recording: Callable[[], Awaitable[U]]) -> T | U:
    """Return the answer about a song, or that about a recording where there is no such song.

    Raises `UnknownSong` where there is neither, and every other `ClientError`.
    """
    try:
        return await song
    except UnknownSong as unknown:
        try:
            return await recording()
        except Refused as refused:
            if refused.status != 404:  # that of a service without recordings, too
                raise
            words = "no song or recording has this id; records are kept for a week"
            raise UnknownSong(words, status=404, type=unknown.type, title="There is no such song") from None
