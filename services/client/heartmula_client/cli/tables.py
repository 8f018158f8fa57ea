"""What is known of songs, recordings, devices and models, as tables and trees for the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.tree import Tree as Branches

from heartmula_client.cli.output import STAGES, minutes, moment
from heartmula_client.responses import (
    Device,
    Devices,
    Parent,
    Recording,
    Recordings,
    Song,
    Songs,
    Tree,
    Version,
)

_MEMORY_BAR = 24  # columns


def song_table(song: Song) -> Table:
    """Return a table of all that is known of a song."""
    rows = {
        "song": song.job_id,
        "title": song.title,
        "goes on from": song.parent and _origin(song.parent),
        "status": song.status,
        "progress": f"{song.progress:.0f} %",
        "stage": None if song.ended else STAGES.get(song.stage or "", song.stage),
        "can be heard": None if song.ended or not song.playable_seconds else minutes(song.playable_seconds),
        "not before": song.not_before and moment(song.not_before),
        "songs before it": song.queue_position,
        "expected": song.eta and moment(song.eta),
        "error": song.error,
        "length": song.duration and minutes(song.duration),
        "format": song.format,
        "seed": song.seed,
        "versions of it": ", ".join(song.children),
        "asked for": moment(song.created_at),
        "ended": song.completed_at and moment(song.completed_at),
    }
    return _rows(rows)


def recording_table(recording: Recording) -> Table:
    """Return a table of all that is known of a recording."""
    rows = {
        "recording": recording.recording_id,
        "title": recording.title,
        "status": recording.status,
        "progress": f"{recording.progress:.0f} %",
        "error": recording.error,
        "length": recording.duration and minutes(recording.duration),
        "sample rate": recording.sample_rate and f"{recording.sample_rate} Hz",
        "channels": recording.channels,
        "uploaded": moment(recording.created_at),
        "as": recording.upload_format,
        "songs that go on from it": ", ".join(recording.children),
    }
    return _rows(rows)


def _rows(values: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in values.items():
        if value not in (None, ""):
            table.add_row(name, str(value))
    return table


def recordings_table(page: Recordings) -> Table:
    """Return a table of a page of recordings."""
    table = Table("recording", "status", "progress", "length", "uploaded", "title", box=None, padding=(0, 2, 0, 0))
    for each in page.recordings:
        length = minutes(each.duration) if each.duration else ""
        progress = f"{each.progress:.0f} %"
        table.add_row(each.recording_id, each.status, progress, length, moment(each.created_at), each.title)
    return table


def songs_table(page: Songs) -> Table:
    """Return a table of a page of songs."""
    table = Table("song", "status", "progress", "length", "asked for", "title", box=None, padding=(0, 2, 0, 0))
    for song in page.songs:
        table.add_row(
            song.job_id,
            _state(song),
            f"{song.progress:.0f} %",
            minutes(song.duration) if song.duration else "",
            moment(song.created_at),
            song.name,
        )
    return table


def _state(song: Song) -> str:
    """Say how far a song is, and for what time it waits in no queue."""
    if song.not_before and song.status == "queued" and song.queue_position is None:
        return f"queued, not before {moment(song.not_before)}"
    return song.status


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
        known = found.recording
        what = "  ".join(filter(None, ("recording", known.title))) if known else "gone"
        whole = Branches(f"{found.root}  {what}")
    grow(whole, below.get(found.root, []))
    return whole


def _version(version: Version, song: str) -> str:
    start = "" if version.at_ms is None else f"from {minutes(version.at_ms / 1000)}"
    here = "<" if version.job_id == song else ""
    return "  ".join(filter(None, (version.job_id, start, version.status, version.title, here)))


def _origin(parent: Parent) -> str:
    """Say what a song goes on from, and from which moment."""
    what = f"recording {parent.id}" if parent.recording_id else parent.id
    return f"{what}{'' if parent.exists else ' (gone)'} at {minutes(parent.at_ms / 1000)}"


def devices_view(found: Devices) -> Iterator[RenderableType]:
    """Yield each device with its memory, its holder and its workers, then the queues and the problems."""
    for device in found.gpus:
        yield f"{device.name} ({device.id})"
        yield _device_table(device)
    if not found.gpus:
        yield "no worker has reported a device"
    waiting = {"tokens": found.queue.tokens, "audio": found.queue.decode}
    if found.queue.encode:
        waiting["the encoder"] = found.queue.encode
    if found.queue.intake:
        waiting["being submitted"] = found.queue.intake
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
    table.add_row("  held by", f"{held.role} {held.owner}{phase}, since {moment(held.since)}" if held else "no worker")
    for waiting in device.waiting:
        table.add_row("  waits", f"{waiting.role} {waiting.owner}, since {moment(waiting.since)}")
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


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
