"""The commands for songs that go on from one another: to request one, and to show which there are."""

from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import click

from heartmula_client.cli.arguments import Moment, read_lyrics
from heartmula_client.cli.generate import Order, make_songs, order_options, read_order
from heartmula_client.cli.output import Display
from heartmula_client.cli.recordings import find, read_file, send
from heartmula_client.cli.runtime import ExitStatus, connected, connection_options
from heartmula_client.cli.tables import tree_view
from heartmula_client.client import AsyncClient
from heartmula_client.responses import Recording, Song
from heartmula_client.schema import JOB_ID, ContinueFrom


@click.command()
@connection_options
@click.argument("song")
@click.option("--at", type=Moment(), help="How much of it to keep: 1:04, 64 or 64.5s. All of it if left out.")
@click.option("--min-new", type=click.FloatRange(min=0), metavar="SECONDS", help="The model cannot end it before; 10.")
@click.option("--recording", is_flag=True, help="SONG is the id of a recording, and need not be looked up.")
@order_options
def extend(
    song: str,
    at: int | None,
    min_new: float | None,
    recording: bool,
    lyrics: str | None,
    lyrics_file: BinaryIO | None,
    **options: Any,
) -> None:
    """Ask for a song that begins as another one and goes on differently, then as `generate`.

    SONG is the id of a song or of a recording, or an audio file, which is uploaded first. Lyrics, tags and --seconds
    are those of the whole song, the part that is kept included. Lyrics and tags that are left out are those of the
    other song; of a recording the lyrics have to be given.

    \b
    Examples:
      heartmula extend 2f0c… --at 1:04 --lyrics-file song.txt --seconds 150
      heartmula extend 2f0c… --at 24 --tags "jazz, piano" --variants 4 --output .
      heartmula extend humming.wav --at 0:20 --tags "pop, piano" --lyrics-file song.txt
    """
    given = options["instrumental"] or not (lyrics is None and lyrics_file is None)
    path = Path(song)
    file = read_file(path) if not recording and path.exists() and not path.is_dir() else None
    if file is None and not JOB_ID.fullmatch(song):
        raise click.BadParameter(f"{song!r} is neither a file that is there nor an id.", param_hint="SONG")
    if (file or recording) and not given:
        raise _no_lyrics()
    order = read_order(
        lyrics=read_lyrics(lyrics, lyrics_file, instrumental=options["instrumental"]) if given else None,
        min_new_ms=None if min_new is None else round(min_new * 1000),
        **options,
    )
    _extend(file or (Recording(recording_id=song, status="") if recording else song), at, order)


@connected
async def _extend(
    client: AsyncClient, display: Display, source: Path | Recording | str, at: int | None, order: Order
) -> ExitStatus:
    """Go on from an audio file, a recording, or what has this id."""
    asked = order.request
    if isinstance(source, Path):
        found: Song | Recording = await send(client, display, source)
        if found.status == "failed":
            return ExitStatus.FAILED
    else:
        found = source if isinstance(source, Recording) else await find(client, source)
    if isinstance(found, Song):
        origin = ContinueFrom(job_id=found.job_id, at_ms=at)
        usual = {name: found.request.get(name, "") for name in ("lyrics", "tags")}
        if asked["lyrics"] is None:  # those of a song without words are section marks
            usual["instrumental"] = found.request.get("instrumental") or None
    elif asked["lyrics"] is None:
        raise _no_lyrics()
    else:
        origin, usual = ContinueFrom(recording_id=found.recording_id, at_ms=at), {"tags": ""}
    missing = {name: value for name, value in usual.items() if asked[name] is None}
    return await make_songs(client, display, replace(order, request=asked | missing | {"continue_from": origin}))


def _no_lyrics() -> click.UsageError:
    return click.UsageError("A recording has no lyrics: give --lyrics or --lyrics-file, at least --lyrics ''.")


@click.command()
@connection_options
@click.argument("song")
@connected
async def tree(client: AsyncClient, display: Display, song: str) -> ExitStatus:
    """Show the songs that go on from one another, those before and after SONG.

    \b
    Example:
      heartmula tree 2f0c…
    """
    found = await client.tree(song)
    display.emit(found) if display.json else display.show(tree_view(found, song))
    return ExitStatus.OK
