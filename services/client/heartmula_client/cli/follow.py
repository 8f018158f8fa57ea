"""Follow songs to their end and save them, with progress bars. Ctrl-C says how to go on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from heartmula_client.cli.output import Display, SongBar
from heartmula_client.cli.recordings import of_either
from heartmula_client.client import AsyncClient
from heartmula_client.errors import how_it_ended
from heartmula_client.responses import Song
from heartmula_client.schema import AudioFormat


async def follow(client: AsyncClient, display: Display, ids: list[str], *, print_events: bool) -> list[Song]:
    """Show the events of songs until all have ended; returns their final states, in the order of `ids`.

    `print_events` prints each event, where the output is JSON. Raises a `ClientError`.
    """

    try:
        with display.song_bars(len(ids)) as bars:
            shown = [_show(client, display, job_id, bar, print_events) for job_id, bar in zip(ids, bars, strict=True)]
            await asyncio.gather(*shown)
            songs = [await client.status(job_id) for job_id in ids]
    except asyncio.CancelledError:
        again = "; ".join(f"heartmula watch {job_id}" for job_id in ids)
        display.say(f"the song goes on without you. To see it again: {again}")
        raise
    for song in songs:
        if song.status != "completed":
            display.say(how_it_ended(song))
    return songs


@asynccontextmanager
async def watching(client: AsyncClient, display: Display, ids: list[str]) -> AsyncIterator[None]:
    """Show the progress of songs while the block works on them. What fails here fails there too, with its words."""
    with display.song_bars(len(ids)) as bars:
        shown = [_show(client, display, job_id, bar, False) for job_id, bar in zip(ids, bars, strict=True)]
        watchers = [asyncio.create_task(each) for each in shown]
        try:
            yield
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)


async def _show(client: AsyncClient, display: Display, job_id: str, bar: SongBar, print_events: bool) -> None:
    async with aclosing(client.watch(job_id)) as events:
        async for event in events:
            if display.json and print_events:
                display.emit(event)
            bar.update(event)


async def save(
    client: AsyncClient,
    display: Display,
    job_id: str,
    output: Path | None,
    format: AudioFormat | None = None,  # noqa: A002
) -> Path:
    """Download a completed song, or a recording, to the file or folder `output`; returns the file.

    Raises a `ClientError`, and `OSError` where the file cannot be written.
    """
    try:
        with display.file_bar("downloading") as bar:
            saved = await of_either(
                client.download(job_id, output, format=format, on_progress=bar.update),
                lambda: client.download_recording(job_id, output, format=format, on_progress=bar.update),
            )
    except asyncio.CancelledError:
        display.say(f"to resume the download: heartmula download {job_id}")
        raise
    if not display.json:
        display.show(str(saved))
    return saved
