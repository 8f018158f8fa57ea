"""Arguments that click has no types for: lyrics from an option or a file, the output's format, moments of a song."""

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args

import click

from heartmula_client.schema import AudioFormat


def read_lyrics(text: str | None, file: BinaryIO | None, *, instrumental: bool = False) -> str:
    """Return the lyrics, of which either the text or a file has to be given, unless the song is instrumental.

    Raises `click.UsageError`.
    """
    if instrumental and text is None and file is None:
        return ""
    if (text is None) == (file is None):
        raise click.UsageError("Give either --lyrics or --lyrics-file (- is standard input), or --instrumental.")
    if file is None:
        return text or ""
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise click.BadParameter("the file is not UTF-8", param_hint="--lyrics-file") from None


def choose_format(output: Path, wanted: AudioFormat | None) -> AudioFormat | None:
    """Return the audio format for the file or folder `output`: the one its name ends with, else `wanted`.

    Raises `click.UsageError` where they contradict each other, and where there is no folder to write to.
    """
    if not output.is_dir() and not output.parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
    ending = output.suffix.removeprefix(".").lower()
    if output.is_dir() or ending not in get_args(AudioFormat):
        return wanted
    if wanted is not None and wanted != ending:
        raise click.UsageError(f"--output ends with .{ending}, but --format says {wanted}.")
    return cast("AudioFormat", ending)


class Time(click.ParamType[datetime]):
    """A time: 22:00, the next one, or 2026-01-31T22:00. Without a zone such as Z it is that of this machine."""

    name = "time"
    _CLOCK = re.compile(r"(\d\d?):(\d\d)", re.ASCII)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Read a time. Raises `click.BadParameter`."""
        text, now = str(value).strip(), datetime.now()
        try:
            if clock := self._CLOCK.fullmatch(text):
                today = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
                return (today if today > now else today + timedelta(days=1)).astimezone()
            return datetime.fromisoformat(text).astimezone()
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time such as 22:00, 2026-01-31T22:00 or 2026-01-31T22:00Z", param, ctx)


class Moment(click.ParamType[int]):
    """A moment of a song, in milliseconds: 1:04, 64, 64.5s or 1:02:03.250."""

    name = "time"
    _FORM = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)s?", re.ASCII)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a moment. Raises `click.BadParameter`."""
        found = self._FORM.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no time such as 1:04, 64 or 64.5s", param, ctx)
        hours, minutes, seconds = (float(part or 0) for part in found.groups())
        if (found[2] is not None and seconds >= 60) or (found[1] is not None and minutes >= 60):
            self.fail(f"{value!r} has more than 59 seconds or minutes after a colon", param, ctx)
        return round((hours * 3600 + minutes * 60 + seconds) * 1000)
