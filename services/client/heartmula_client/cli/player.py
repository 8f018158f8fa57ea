"""Programs that play what they read from standard input: which there are, and one that runs."""

import asyncio
import contextlib
import shlex
import shutil
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import click

from heartmula_client.schema import AudioFormat

_FORMAT = "{format}"  # in arguments, for the format of the audio
# In the order in which they are looked for. Quiet, because progress is shown beside them.
PLAYERS = {
    "mpv": ("--no-video", "--really-quiet", "-"),
    "ffplay": ("-nodisp", "-autoexit", "-loglevel", "error", "-i", "-"),
    "cvlc": ("--quiet", "--play-and-exit", "-"),
    "play": ("-q", "-t", _FORMAT, "-"),
}
player_option = click.option(
    "--player",
    metavar="NAME",
    shell_complete=lambda _context, _option, begun: [name for name in PLAYERS if name.startswith(begun)],
    help=f"One of {', '.join(PLAYERS)}, or a command that plays its standard input.",
)
_PATIENCE = 3.0  # seconds for a player to end that is asked to


def find_player(wanted: str | None, form: AudioFormat) -> list[str] | None:
    """Return the command that plays audio of a format: `wanted`, else the first player that is on the PATH, if any.

    `wanted` is the name of a player in `PLAYERS`, or a command with all its arguments. Raises `click.BadParameter`
    where there is no such program.
    """
    if wanted is None:
        name = next((name for name in PLAYERS if shutil.which(name)), None)
        return None if name is None else [name, *_arguments(name, form)]
    try:
        program, *arguments = shlex.split(wanted)
    except ValueError:
        raise click.BadParameter(f"{wanted!r} is no command", param_hint="--player") from None
    if shutil.which(program) is None:
        raise click.BadParameter(f"there is no program {program}", param_hint="--player")
    return [program, *(arguments or _arguments(program, form))]


def _arguments(name: str, form: AudioFormat) -> Sequence[str]:
    return [form if word == _FORMAT else word for word in PLAYERS.get(name, ())]


class Player:
    """A player that runs, used in ``async with``: at its end, all that was written is played to the last sound.

    It is stopped where the block ends because the command is interrupted.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.name = command[0]
        self.ended: asyncio.Task[int]  # its exit code
        self._command = command
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        """Start it. Raises `OSError`."""
        # Standard output is for results: what the player has to say goes to standard error.
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=asyncio.subprocess.PIPE, stdout=2)
        self.ended = asyncio.create_task(self._process.wait())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for its end, or stop it."""
        try:
            if kind is None or issubclass(kind, Exception):
                self._input.close()
                await self._process.wait()
        finally:
            await self._stop()

    async def write(self, block: bytes) -> None:
        """Hand over audio; returns when the player wants more. What comes after its end is dropped."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._input.write(block)
            await self._input.drain()

    @property
    def _input(self) -> asyncio.StreamWriter:
        assert self._process.stdin is not None
        return self._process.stdin

    async def _stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
        await self.ended
