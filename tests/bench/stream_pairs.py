"""Songs a second of two checkouts, without listeners, in alternation: what it costs that songs can be listened to."""

import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from tests.bench.checkpoints import long_songs
from tests.bench.pairs import alternate, interval
from tests.bench.sides import ROOT, checkout_side

SLOWER = 0.97  # of the base's songs a second
SCRIPT = ROOT / "tests" / "bench" / "stream_side.py"


@dataclass(frozen=True)
class Songs:
    """Songs that are made in one turn of a side."""

    name: str
    count: int
    seconds: float  # of each
    step_ms: int  # that a frame takes, and a step of the codec for two seconds


LENGTHS = (Songs("long", 16, 180, 5), Songs("long", 24, 180, 0), Songs("short", 200, 1, 0))
QUICK_LENGTHS = (Songs("short", 4, 1, 0),)
PAIRS, QUICK_PAIRS = 5, 2


def compare(here: Path, base: Path, *, cpu_time: bool, quick: bool) -> None:
    """Print a line for each length of songs; with `cpu_time`, songs a second of the services' CPU time."""
    clock, pairs = "cpu" if cpu_time else "wall", QUICK_PAIRS if quick else PAIRS
    for songs in QUICK_LENGTHS if quick else LENGTHS:
        with ExitStack() as stack:
            checkpoint = str(long_songs(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-stream-")))))
            arguments = (checkpoint, clock, str(songs.step_ms))
            ours, theirs = (stack.enter_context(checkout_side(side, SCRIPT, *arguments)) for side in (here, base))
            command = json.dumps([songs.count, round(1000 * songs.seconds)])
            taken = alternate(partial(ours, command), partial(theirs, command), pairs)
        ratios = [base_s / here_s for here_s, base_s in taken]
        low, high = interval(ratios)
        row = {
            "bench": "stream_songs",
            "songs": songs.name,
            "song_s": songs.seconds,
            "frame_ms": songs.step_ms,
            "clock": clock,
            "songs_per_s": round(songs.count / median(here_s for here_s, _ in taken), 2),
            "base_songs_per_s": round(songs.count / median(base_s for _, base_s in taken), 2),
            "ratio": round(median(ratios), 3),
            "interval": [round(low, 3), round(high, 3)],
            "slower": high < SLOWER,
            "cpu_load": round(os.getloadavg()[0], 1),
        }
        print(json.dumps(row), flush=True)
