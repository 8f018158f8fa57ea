"""What a benchmark of a card says: rows as JSON lines as they come, a table at the end, all within a time limit."""

import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

Row = dict[str, Any]


class TimeUp(Exception):
    """The time limit has passed in the middle of a measurement."""


class Report:
    """Rows of a run that lasts at most `limit` seconds. Measurements begin while there is time for them."""

    def __init__(self, limit: float) -> None:
        self._limit, self._began = limit, time.monotonic()
        self.rows: list[Row] = []
        self.failed = False

    @property
    def left(self) -> float:
        """Seconds until the time limit."""
        return self._began + self._limit - time.monotonic()

    def emit(self, bench: str, **fields: Any) -> None:
        """Print a row as a JSON line at once, and keep it for the table."""
        row = {"bench": bench, **fields}
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def measure(self, what: str, work: Callable[[], object], expected: float) -> bool:
        """Run `work` unless less than the `expected` seconds are left; whether it ended well.

        An error becomes a row, and the next measurement can begin: one fault must not cost all the others.
        """
        if self.left < expected:
            self.emit("skipped", what=what, why=f"{max(0.0, self.left):.0f} s are left, about {expected:.0f} needed")
            return False
        try:
            work()
        except TimeUp:
            self.emit("skipped", what=what, why="the time limit came in the middle of it")
            return False
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            self.emit("error", what=what, error=f"{type(error).__name__}: {str(error)[:300]}")
            return False
        return True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Interrupt the body at the time limit, and at SIGTERM as at Ctrl-C; then, whatever happened, the table."""
        before = [
            signal.signal(signal.SIGALRM, _raise(TimeUp())),
            signal.signal(signal.SIGTERM, _raise(SystemExit(128 + signal.SIGTERM))),
        ]
        signal.setitimer(signal.ITIMER_REAL, max(0.01, self.left))
        try:
            yield
        except TimeUp:
            self.emit("skipped", what="the rest", why="the time limit")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in zip((signal.SIGALRM, signal.SIGTERM), before, strict=True):
                signal.signal(number, handler)
            counts = {name: sum(row["bench"] == name for row in self.rows) for name in ("skipped", "error")}
            self.emit("end", seconds=round(time.monotonic() - self._began, 1), rows=len(self.rows), **counts)
            print(table(self.rows), flush=True)


def _raise(error: BaseException) -> Callable[[int, FrameType | None], NoReturn]:
    def handler(number: int, frame: FrameType | None) -> NoReturn:
        raise error

    return handler


def table(rows: list[Row]) -> str:
    """Rows as Markdown, a table for each kind of row, with a column for each of its fields."""
    lines: list[str] = []
    for bench in dict.fromkeys(row["bench"] for row in rows):
        alike = [row for row in rows if row["bench"] == bench]
        columns = list(dict.fromkeys(name for row in alike for name in row if name != "bench"))
        lines += ["", f"**{bench}**", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in alike]
    return "\n".join(lines)
