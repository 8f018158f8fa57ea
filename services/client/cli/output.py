"""Output on the terminal: results as JSON or tables on standard output, messages and bars on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import msgspec
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.tree import Tree as Branches

from services.client.responses import Device, Devices, Event, Parent, Song, Songs, Tree, Version

_STAGES = {
    "queued": "waiting",
    "loading": "loading the model",
    "generating": "writing tokens",
    "paused": "paused, the device is lent",
    "waiting": "waiting for the codec",
    "decoding": "decoding audio",
    "storing": "storing",
}
_WIDTH = 200  # columns where the output is no terminal
_MEMORY_BAR = 24  # columns


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
    def file_bar(self) -> Iterator["FileBar"]:
        """Show a progress bar for a download."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
        with Progress(*columns, console=self.notes, disable=self.json or not self.notes.is_terminal) as progress:
            yield FileBar(progress)


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
        stage = event.status if event.ended else _STAGES.get(self._stage or event.status, event.status)
        words = f"{self._label}{stage}"
        expected = _expected(event)
        self._playable = max(self._playable, event.playable_seconds or 0)
        audible = f"{_minutes(self._playable)} can be heard" if self._playable and not event.ended else ""
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
    """Progress of a download."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("downloading", total=None)

    def update(self, done: int, total: int) -> None:
        """Show the received and the total bytes; `total` is negative where it is unknown."""
        self._progress.update(self._task, completed=done, total=total if total >= 0 else None)


def song_table(song: Song) -> Table:
    """Return a table of all that is known of a song."""
    table = Table.grid(padding=(0, 2))
    rows = {
        "song": song.job_id,
        "title": song.title,
        "goes on from": song.parent and _origin(song.parent),
        "status": song.status,
        "progress": f"{song.progress:.0f} %",
        "stage": None if song.ended else _STAGES.get(song.stage or "", song.stage),
        "can be heard": None if song.ended or not song.playable_seconds else _minutes(song.playable_seconds),
        "songs before it": song.queue_position,
        "expected": song.eta and _moment(song.eta),
        "error": song.error,
        "length": song.duration and _minutes(song.duration),
        "format": song.format,
        "seed": song.seed,
        "versions of it": ", ".join(song.children),
        "asked for": _moment(song.created_at),
        "ended": song.completed_at and _moment(song.completed_at),
    }
    for name, value in rows.items():
        if value not in (None, ""):
            table.add_row(name, str(value))
    return table


def songs_table(page: Songs) -> Table:
    """Return a table of a page of songs."""
    table = Table("song", "status", "progress", "length", "asked for", "title", box=None, padding=(0, 2, 0, 0))
    for song in page.songs:
        table.add_row(
            song.job_id,
            song.status,
            f"{song.progress:.0f} %",
            _minutes(song.duration) if song.duration else "",
            _moment(song.created_at),
            song.name,
        )
    return table


def tree_view(found: Tree, song: str) -> RenderableType:
    """Return the songs that go on from one another as a tree, in which `song` is marked."""
    below: dict[str | None, list[Version]] = {}
    for version in found.songs:
        below.setdefault(version.parent if version.job_id != found.root else None, []).append(version)

    def grow(branch: Branches, versions: list[Version]) -> None:
        for version in versions:
            grow(branch.add(_version(version, song)), below.get(version.job_id, []))

    if roots := below.get(None):
        whole = Branches(_version(roots[0], song))
    else:
        whole = Branches(f"{found.root}  gone, or a recording")
    grow(whole, below.get(found.root, []))
    return whole


def _version(version: Version, song: str) -> str:
    start = "" if version.at_ms is None else f"from {_minutes(version.at_ms / 1000)}"
    here = "<" if version.job_id == song else ""
    return "  ".join(filter(None, (version.job_id, start, version.status, version.title, here)))


def _origin(parent: Parent) -> str:
    """Say what a song goes on from, and from which moment."""
    what = f"recording {parent.id}" if parent.recording_id else parent.id
    return f"{what}{'' if parent.exists else ' (gone)'} at {_minutes(parent.at_ms / 1000)}"


def devices_view(found: Devices) -> Iterator[RenderableType]:
    """Yield each device with its memory, its holder and its workers, then the queues and the problems."""
    for device in found.gpus:
        yield f"{device.name} ({device.id})"
        yield _device_table(device)
    if not found.gpus:
        yield "no worker has reported a device"
    waiting = {"tokens": found.queue.tokens, "audio": found.queue.decode}
    yield "queues: " + ", ".join(f"{'?' if n is None else n} for {name}" for name, n in waiting.items())
    yield from (f"problem: {problem}" for problem in found.problems)


def _device_table(device: Device) -> Table:
    table = Table.grid(padding=(0, 2))
    bar = Table.grid(padding=(0, 1))
    figures = f"{_gib(device.memory_used)} of {_gib(device.memory_total)}"
    bar.add_row(
        ProgressBar(total=max(1, device.memory_total), completed=device.memory_used, width=_MEMORY_BAR), figures
    )
    table.add_row("  memory", bar)
    if device.utilization is not None:
        table.add_row("  use", f"{device.utilization} %")
    if device.temperature is not None:
        table.add_row("  temperature", f"{device.temperature} °C")
    held = device.lease
    phase = f", phase {held.phase}" if held and held.phase is not None else ""
    table.add_row("  held by", f"{held.role} {held.owner}{phase}, since {_moment(held.since)}" if held else "no worker")
    for waiting in device.waiting:
        table.add_row("  waits", f"{waiting.role} {waiting.owner}, since {_moment(waiting.since)}")
    table.add_row("  on it", ", ".join(device.resident) or "nothing")
    for worker in device.workers:
        rate = f", {worker.rate:.1f} frames/s" if worker.rate else ""
        trouble = f"; {worker.problem}" if worker.problem else ""
        table.add_row(f"  {worker.role}", f"{worker.state}, {len(worker.jobs)} of {worker.slots} songs{rate}{trouble}")
    return table


def models_of(found: Devices) -> list[dict[str, Any]]:
    """List the model of each live worker and what is loaded on its device."""
    return [
        {
            "role": worker.role,
            "model": worker.model,
            "engine": worker.engine,
            "instance": worker.instance,
            "device": device.id,
            "resident": device.resident,
            "state": worker.state,
            "problem": worker.problem,
        }
        for device in found.gpus
        for worker in device.workers
    ]


def models_table(models: list[dict[str, Any]]) -> Table:
    """Return a table of what `models_of` lists."""
    table = Table("role", "model", "engine", "device", "on the device", "state", box=None, padding=(0, 2, 0, 0))
    for model in models:
        row = [str(model[name]) for name in ("role", "model", "engine", "device")]
        state = f"{model['state']}; {model['problem']}" if model["problem"] else str(model["state"])
        table.add_row(*row, ", ".join(model["resident"]) or "nothing", state)
    return table


def _expected(event: Event) -> str:
    if event.ended:
        return ""
    place = f"{event.queue_position} before it" if event.queue_position is not None else ""
    ready = f"ready at {_moment(event.eta, '%H:%M:%S')}" if event.eta else ""
    return ", ".join(part for part in (place, ready) if part)


def _moment(rfc3339: str, shape: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Format a time in the local time zone; text that is no time is returned unchanged."""
    try:
        return datetime.fromisoformat(rfc3339).astimezone().strftime(shape)
    except ValueError:
        return rfc3339


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
