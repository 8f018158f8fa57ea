"""Rows of measurements: printed as JSON lines as they come, and as one table at the end."""

import json
from statistics import median
from typing import Any

Row = dict[str, Any]

ROWS: list[Row] = []


def emit(row: Row) -> None:
    """Print a row as a JSON line, and keep it for the table at the end."""
    ROWS.append(row)
    print(json.dumps(row), flush=True)


def table() -> None:
    """Print all rows as a Markdown table, with a column for each field that any row has."""
    columns = list(dict.fromkeys(name for row in ROWS for name in row))
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in ROWS:
        print("| " + " | ".join(str(row.get(name, "")) for name in columns) + " |")


def compare(row: Row, turns: list[list[Row]], songs: int = 1) -> Row:
    """Medians of both sides, their peaks of memory, and how many times as many frames a second the native engine
    makes."""
    medians = [median(reply["ms"] for reply in side) for side in zip(*turns, strict=True)]
    for name, taken, last in zip(("native", "heartlib"), medians, turns[-1], strict=False):
        row[f"{name}_ms"] = round(taken, 2)
        row |= {f"{name}_{peak}": last[peak] for peak in ("peak_rss_mb", "peak_device_mb") if peak in last}
    if len(medians) > 1:
        row["ratio"] = round(songs * medians[1] / medians[0], 2)
    return row
