"""Play songs while they are made: the audio goes to a player, a file or standard output as it grows."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from heartmula_client.cli.arguments import choose_format
from heartmula_client.cli.follow import watching
from heartmula_client.cli.output import Display
from heartmula_client.cli.outputs import FileOutput, StandardOutput
from heartmula_client.cli.player import PLAYERS, Player, find_player
from heartmula_client.cli.runtime import Connection, ExitStatus
from heartmula_client.client import AsyncClient
from heartmula_client.download import choose_path
from heartmula_client.errors import ClientError, SongIncomplete
from heartmula_client.responses import Song
from heartmula_client.schema import AudioFormat

_Output = FileOutput | StandardOutput | Player

_STDOUT = Path("-")


@dataclass(frozen=True)
class Playing:
    """How songs are played, from the options."""

    form: AudioFormat
    output: Path | None  # file or folder to save to, `_STDOUT`, or None
    command: list[str] | None  # the player
    start: float = 0.0  # seconds


def playing(form: AudioFormat | None, output: Path | None, player: str | None, start: float = 0.0) -> Playing:
    """Make sense of the options, and find the player. Raises `click.UsageError`."""
    if output != _STDOUT:
        wanted = (choose_format(output, form) if output else form) or "flac"
        return Playing(wanted, output, find_player(player, wanted), start)
    if player is not None:
        raise click.UsageError("--output - is for a player of your own: leave --player out.")
    if click.get_current_context().ensure_object(Connection).json:
        raise click.UsageError("--output - and --json both write to standard output: name a file.")
    if sys.stdout.isatty():
        raise click.UsageError("--output - writes audio, which a terminal cannot show: redirect it, or name a file.")
    return Playing(form or "flac", output, None, start)


async def play_songs(client: AsyncClient, display: Display, ids: list[str], how: Playing) -> ExitStatus:
    """Play songs one after the other, and show the progress of all; returns the command's exit code.

    Raises a `ClientError`, and `OSError` where a file cannot be written or a player cannot be started.
    """
    songs = [_PlayedSong(client, display, job_id, how) for job_id in ids]
    try:
        async with watching(client, display, ids):
            for song in songs:
                await song.play()
    except asyncio.CancelledError:
        again = "; ".join(f"heartmula play {job_id}" for job_id in ids)
        display.say(f"the song goes on without you. To hear it again: {again}")
        raise
    for song in songs:
        song.report()
    return ExitStatus.FAILED if any(song.failed for song in songs) else ExitStatus.OK


class _PlayedSong:
    """A song on its way from the service to its outputs."""

    def __init__(self, client: AsyncClient, display: Display, job_id: str, how: Playing) -> None:
        self.failed = False  # whether the song failed or was cancelled, or the player failed
        self._client, self._display, self._job_id, self._how = client, display, job_id, how
        self._song: Song | None = None  # its state when its audio ended
        self._path: Path | None = None  # the file that it is saved to

    async def play(self) -> None:
        """Play it to its end, or to the player's."""
        names: list[str | None] = []
        how = self._how
        stream = self._client.stream(self._job_id, format=how.form, start=how.start, on_name=names.append)
        try:
            async with aclosing(stream) as blocks:
                first = await anext(blocks, b"")  # nothing is opened before there is something to play
                await self._share(first, blocks, next(filter(None, names), f"{self._job_id}.{how.form}"))
        except SongIncomplete as error:
            self._say_incomplete(error)
        except (ClientError, asyncio.CancelledError):
            if self._path:
                self._display.say(f"{self._path} holds what was received of it")
            raise
        if self._song is None:  # the player has ended first
            self._song = await self._client.status(self._job_id)
        self.failed |= self._song.ended and self._song.status != "completed"

    def report(self) -> None:
        """Print the result."""
        if self._display.json:
            path = {"path": str(self._path)} if self._path else {}
            self._display.emit(msgspec.to_builtins(self._song) | path)
        elif self._path and self._song and self._song.status == "completed":
            self._display.show(str(self._path))

    async def _share(self, first: bytes, blocks: AsyncIterator[bytes], name: str) -> None:
        """Copy the audio to every output until it ends, or until the player ends and there is no other output."""
        async with AsyncExitStack() as stack:
            outputs = list(self._outputs(name))
            for output in outputs:
                await stack.enter_async_context(output)
            player = next((output for output in outputs if isinstance(output, Player)), None)
            copying = asyncio.create_task(self._copy(first, blocks, outputs))
            try:
                if player is None or not await self._ends_first(player, copying) or len(outputs) > 1:
                    await copying
            finally:
                copying.cancel()
                await asyncio.wait({copying})
        if player and (code := player.ended.result()):
            self._display.say(f"{player.name} failed with exit code {code}")
            self.failed = True

    def _outputs(self, name: str) -> Iterator[_Output]:
        """Yield where the audio goes; `name` is the service's name for the file."""
        how = self._how
        if how.output == _STDOUT:
            yield StandardOutput()
        elif how.output is not None or how.command is None:
            self._path = choose_path(how.output, name)
            if how.command is None:
                self._display.say(f"no player was found ({', '.join(PLAYERS)}): saving the song as {self._path}")
            yield FileOutput(self._path)
        if how.command is not None:
            yield Player(how.command)

    async def _copy(self, first: bytes, blocks: AsyncIterator[bytes], outputs: Sequence[_Output]) -> None:
        try:
            for output in outputs:
                await output.write(first)
            async for block in blocks:
                for output in outputs:
                    await output.write(block)
        except SongIncomplete as error:
            self._say_incomplete(error)
            return
        self._song = await self._client.status(self._job_id)
        if self._path and not self._how.start and not await self._finish(self._path):
            self._display.say(f"{self._path} can be played, but its header does not say how long it is")

    async def _finish(self, path: Path) -> bool:
        try:
            return await self._client.finish_file(self._job_id, path, format=self._how.form)
        except ClientError:
            return False

    async def _ends_first(self, player: Player, copying: asyncio.Task[None]) -> bool:
        await asyncio.wait({copying, player.ended}, return_when=asyncio.FIRST_COMPLETED)
        if not copying.done():
            self._display.say(f"{player.name} has ended before the song did")
        return not copying.done()

    def _say_incomplete(self, error: SongIncomplete) -> None:
        self._song = error.song
        self._display.say(str(error))
        if self._path:
            self._display.say(f"{self._path} holds what there was of it")
