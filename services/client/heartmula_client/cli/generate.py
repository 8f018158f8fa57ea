"""The command that requests songs, and saves or plays them; and what it shares with others that request songs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, get_args

import click
import msgspec

from heartmula_client.cli.arguments import Time, choose_format, read_lyrics
from heartmula_client.cli.follow import follow, save
from heartmula_client.cli.output import Display
from heartmula_client.cli.play import Playing, play_songs, playing
from heartmula_client.cli.player import player_option
from heartmula_client.cli.runtime import ExitStatus, connected, connection_options
from heartmula_client.client import AsyncClient
from heartmula_client.schema import AudioFormat, Priority, WebhookEvent

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Order:
    """Songs to request, and what to do with them."""

    request: dict[str, Any]  # the arguments of `AsyncClient.generate`
    wait: bool
    output: Path | None  # file or folder to save them to
    how: Playing | None  # None: they are not played


def order_options(command: _Command) -> _Command:
    """Add the options that every request for songs has. `read_order` makes an order of their values."""
    options = (
        click.option("--lyrics", help="The words; lines such as [Verse] mark sections."),
        click.option(
            "--lyrics-file", type=click.File("rb"), help="A file (UTF-8) that holds them; - is standard input."
        ),
        click.option("--tags", help="Style, comma-separated."),
        click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Maximum length of the song."),
        click.option("--seed", type=int, help="The same seed gives the same song."),
        click.option("--temperature", type=float, help="0 always takes the likeliest token."),
        click.option("--topk", type=int, help="Sample from this many of the likeliest tokens."),
        click.option("--cfg-scale", type=float, help="Guidance; 1 switches it off and is faster."),
        click.option("--format", "form", type=click.Choice(get_args(AudioFormat)), help="As --output ends, or flac."),
        click.option("--title", help="Written into the file."),
        click.option("--priority", type=click.Choice(get_args(Priority)), help="high goes first."),
        click.option("--variants", type=click.IntRange(1, 4), help="Number of songs, with consecutive seeds."),
        click.option("--instrumental", is_flag=True, help="No words: no lyrics, or section marks alone."),
        click.option("--not-before", type=Time(), help="Queue it then: 22:00, 2026-01-31T22:00 or with a zone."),
        click.option("--webhook-url", metavar="URL", help="Notified when the song has ended."),
        click.option(
            "--webhook-events",
            type=click.Choice(get_args(WebhookEvent)),
            multiple=True,
            help="Or when else; repeat it.",
        ),
        click.option("--wait/--no-wait", default=True, show_default=True, help="Watch the song and save it."),
        click.option("--play", is_flag=True, help="Play the song from its first sound; save it only with --output."),
        player_option,
        click.option("-o", "--output", type=click.Path(path_type=Path), help="File or folder to save it to."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def read_order(
    *,
    seconds: float | None,
    form: AudioFormat | None,
    wait: bool,
    play: bool,
    player: str | None,
    output: Path | None,
    **wanted: Any,
) -> Order:
    """Check the options against each other. Raises `click.UsageError`."""
    if output is not None:
        if not wait:
            raise click.UsageError("--output needs --wait; `heartmula download` saves the song later.")
        if (wanted["variants"] or 1) > 1 and not output.is_dir():
            raise click.UsageError("--output has to be a folder when several songs are requested.")
        form = choose_format(output, form)
    if not play and player is not None:
        raise click.UsageError("--player needs --play.")
    if play and not wait:
        raise click.UsageError("--play needs --wait; `heartmula play` plays the song later.")
    wanted["webhook_events"] = wanted["webhook_events"] or None  # as the service chooses
    wanted["instrumental"] = wanted["instrumental"] or None
    wanted["max_duration_ms"] = None if seconds is None else round(seconds * 1000)
    how = playing(form, output, player) if play else None
    return Order(request={"format": form, **wanted}, wait=wait, output=output, how=how)


@click.command()
@connection_options
@order_options
def generate(lyrics: str | None, lyrics_file: BinaryIO | None, tags: str | None, **options: Any) -> None:
    """Ask for a song, watch it being made, and save or play it.

    \b
    Examples:
      heartmula generate --tags "pop, piano" --lyrics-file song.txt --seconds 30
      fortune | heartmula generate --lyrics-file - --output song.mp3
      heartmula generate --tags techno --instrumental --play
      heartmula generate --lyrics-file song.txt --not-before 22:00 --no-wait
    """
    # Outside of the event loop, where Ctrl-C interrupts the reading of standard input.
    words = read_lyrics(lyrics, lyrics_file, instrumental=options["instrumental"])
    _request(read_order(lyrics=words, tags=tags or "", **options))


@connected
async def _request(client: AsyncClient, display: Display, order: Order) -> ExitStatus:
    return await make_songs(client, display, order)


async def make_songs(client: AsyncClient, display: Display, order: Order) -> ExitStatus:
    """Request songs, and do with them what the order says."""
    try:
        accepted = await client.generate(**order.request)
    except asyncio.CancelledError:
        display.say("interrupted before the service answered: it may have accepted the song; see `heartmula list`")
        raise
    ids = [each.job_id for each in accepted.variants or [accepted]]
    if not order.wait:
        display.emit(accepted) if display.json else display.show(*ids)
        return ExitStatus.OK
    display.say(f"song {' '.join(ids)}")
    if order.how:
        return await play_songs(client, display, ids, order.how)
    all_saved = True
    for song in await follow(client, display, ids, print_events=False):
        path = await save(client, display, song.job_id, order.output) if song.status == "completed" else None
        all_saved &= path is not None
        if display.json:
            display.emit(msgspec.to_builtins(song) | ({"path": str(path)} if path else {}))
    return ExitStatus.OK if all_saved else ExitStatus.FAILED
