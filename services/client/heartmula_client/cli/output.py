"""Output on the terminal: results on standard output, messages and progress bars on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import msgspec
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn

from heartmula_client.responses import Event

STAGES = {
    "queued": "waiting",
    "loading": "loading the model",
    "generating": "writing tokens",
    "paused": "paused, the device is lent",
    "waiting": "waiting for the codec",
    "decoding": "decoding audio",
    "storing": "storing",
}
_WIDTH = 200  # columns where the output is no terminal


def _console(*, stderr: bool) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    # Titles and errors are shown unchanged: [Verse] is no markup.
    return Console(
        stderr=stderr, markup=False, emoji=False, highlight=False, width=None if terminal else _WIDTH, soft_wrap=False
    )


class Display:
    """Output of one command: results on standard output, messages on standard error."""

    def __init__(self, *, json: bool) -> None:
        """`json` prints results as JSON and draws no bars."""
        self.json = json
        self.results, self.notes = _console(stderr=False), _console(stderr=True)

    def emit(self, value: Any) -> None:
        """Print a result as one line of JSON."""
        sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
        sys.stdout.flush()

    def show(self, *what: RenderableType) -> None:
        """Print a result as text and tables."""
        for each in what:
            self.results.print(each, soft_wrap=isinstance(each, str))

    def say(self, text: str) -> None:
        """Show a message that is no result."""
        self.notes.print(text, soft_wrap=True)

    @contextmanager
    def song_bars(self, count: int) -> Iterator[list["SongBar"]]:
        """Show a progress bar for each of `count` songs; several are numbered."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        expected = TextColumn("{task.fields[expected]}", markup=False)
        with Progress(
            *columns, expected, console=self.notes, disable=self.json or not self.notes.is_terminal
        ) as progress:
            yield [SongBar(self, progress, f"{n}/{count} " if count > 1 else "") for n in range(1, count + 1)]

    @contextmanager
    def file_bar(self, what: str) -> Iterator["FileBar"]:
        """Show a progress bar for a file that is "downloading" or "uploading"."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
        with Progress(*columns, console=self.notes, disable=self.json or not self.notes.is_terminal) as progress:
            yield FileBar(progress, what)


class SongBar:
    """Progress of a song: a bar on a terminal, otherwise a line for each new stage."""

    def __init__(self, display: Display, progress: Progress, label: str) -> None:
        self._display, self._progress, self._label = display, progress, label
        self._task = progress.add_task("", total=100, expected="")
        self._stage: str | None = None
        self._playable = 0.0  # seconds
        self._last_line = ""

    def update(self, event: Event) -> None:
        """Show an event."""
        # Only events that change the stage name it.
        if event.stage or event.status == "queued" or event.ended:
            self._stage = event.stage
        stage = event.status if event.ended else STAGES.get(self._stage or event.status, event.status)
        words = f"{self._label}{stage}"
        expected = _expected(event)
        self._playable = max(self._playable, event.playable_seconds or 0)
        audible = f"{minutes(self._playable)} can be heard" if self._playable and not event.ended else ""
        self._progress.update(
            self._task,
            description=words,
            expected=", ".join(filter(None, (expected, audible))),
            completed=max(event.progress, self._done),
        )
        line = f"{words}, {expected}" if expected and event.status == "queued" else words
        if not self._display.json and not self._display.notes.is_terminal and line != self._last_line:
            self._last_line = line
            self._display.say(line)

    @property
    def _done(self) -> float:
        return next((task.completed for task in self._progress.tasks if task.id == self._task), 0.0)


class FileBar:
    """Progress of a download or an upload."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=None)

    def update(self, done: int, total: int) -> None:
        """Show the bytes that are over, and all; `total` is negative where it is unknown."""
        self._progress.update(self._task, completed=done, total=total if total >= 0 else None)


def _expected(event: Event) -> str:
    if event.ended:
        return ""
    if event.not_before and event.status == "queued" and event.queue_position is None:
        return f"not before {moment(event.not_before)}"
    place = f"{event.queue_position} before it" if event.queue_position is not None else ""
    ready = f"ready at {moment(event.eta, '%H:%M:%S')}" if event.eta else ""
    return ", ".join(part for part in (place, ready) if part)


def moment(rfc3339: str, shape: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Format a time in the local time zone; text that is no time is returned unchanged."""
    try:
        return datetime.fromisoformat(rfc3339).astimezone().strftime(shape)
    except ValueError:
        return rfc3339


def minutes(seconds: float) -> str:
    """Format a length as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
