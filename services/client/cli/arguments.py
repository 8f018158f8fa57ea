"""Checks of arguments that click's types do not make: lyrics from an option or a file, and the output's format."""

from pathlib import Path
from typing import BinaryIO, cast, get_args

import click

from shared.schema.request import AudioFormat


def read_lyrics(text: str | None, file: BinaryIO | None) -> str:
    """Return the lyrics, of which either the text or a file has to be given. Raises `click.UsageError`."""
    if (text is None) == (file is None):
        raise click.UsageError("Give either --lyrics or --lyrics-file (- is standard input).")
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
