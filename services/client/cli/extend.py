"""The commands for songs that go on from one another: to request one, and to show which there are."""

from dataclasses import replace
from typing import Any, BinaryIO

import click

from services.client.cli.arguments import Moment, read_lyrics
from services.client.cli.generate import Order, make_songs, order_options, read_order
from services.client.cli.output import Display, tree_view
from services.client.cli.runtime import ExitStatus, connected, connection_options
from services.client.client import Client
from shared.schema.request import ContinueFrom


@click.command()
@connection_options
@click.argument("song")
@click.option("--at", type=Moment(), help="How much of it to keep: 1:04, 64 or 64.5s. All of it if left out.")
@click.option("--min-new", type=click.FloatRange(min=0), metavar="SECONDS", help="The model cannot end it before; 10.")
@click.option("--recording", is_flag=True, help="SONG is the id of a recording; then give lyrics and tags.")
@order_options
def extend(
    song: str,
    at: int | None,
    min_new: float | None,
    recording: bool,
    lyrics: str | None,
    lyrics_file: BinaryIO | None,
    tags: str | None,
    **options: Any,
) -> None:
    """Ask for a song that begins as another one and goes on differently, then as `generate`.

    Lyrics, tags and --seconds are those of the whole song, the part that is kept included. Lyrics and tags that are
    left out are those of the other song.

    \b
    Examples:
      heartmula extend 2f0c… --at 1:04 --lyrics-file song.txt --seconds 150
      heartmula extend 2f0c… --at 24 --tags "jazz, piano" --variants 4 --output .
    """
    given = not (lyrics is None and lyrics_file is None)
    if recording and not given:
        raise click.UsageError("A recording has no lyrics: give --lyrics or --lyrics-file, at least --lyrics ''.")
    source = ContinueFrom(at_ms=at, **{"recording_id" if recording else "job_id": song})
    order = read_order(
        lyrics=read_lyrics(lyrics, lyrics_file) if given else None,
        tags=tags or "" if recording else tags,
        continue_from=source,
        min_new_ms=None if min_new is None else round(min_new * 1000),
        **options,
    )
    _extend(order)


@connected
async def _extend(client: Client, display: Display, order: Order) -> ExitStatus:
    missing = [name for name in ("lyrics", "tags") if order.request[name] is None]
    if missing:
        parent = await client.song(order.request["continue_from"].job_id)
        order = replace(order, request=order.request | {name: parent.request[name] for name in missing})
    return await make_songs(client, display, order)


@click.command()
@connection_options
@click.argument("song")
@connected
async def tree(client: Client, display: Display, song: str) -> ExitStatus:
    """Show the songs that go on from one another, those before and after SONG.

    \b
    Example:
      heartmula tree 2f0c…
    """
    found = await client.tree(song)
    display.emit(found) if display.json else display.show(tree_view(found, song))
    return ExitStatus.OK
