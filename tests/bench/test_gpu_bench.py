"""The bench for cards runs on the CPU, prints its fields, keeps its time limit, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench import gpu
from tests.bench.gpu_report import Report
from tests.bench.sides import ROOT

PEAKS = {"peak_allocated_mb", "peak_reserved_mb", "used_mb"}
FIELDS = {
    "device": {"name", "memory_gb", "compute", "cuda", "torch", "triton", "cores"},
    "limits": {"copy_gb_per_s", "launch_us", "graph_us"},
    "product": {"rows", "shape", "gb_per_s", "of_copy"},
    "checkpoint": {"model", "folder", "gb", "s"},
    "load": {"model", "dtype", "s", "gb_per_s"},
    "move": {"model", "dtype", "gb", "to_device_ms"},
    "prefill": {"prompt", "frames", "first_ms", "ms", "tflop_per_s", *PEAKS},
    "frame": {"dtype", "int8", "way", "songs", "position", "ms", "songs_per_s", "launches", "kernels_ms", "gb"}
    | {"gb_per_s", "of_copy", "first_ms", "captures", "capture_ms", *PEAKS},
    "profile": {"way", "songs", "position", "kernel", "a_frame", "us_a_frame"},
    "ratio": {"songs", "position", "graphs_ms", "kernels_ms", "loop_ms", "loop_by_graphs", "kernels_by_graphs"},
    "parking": {"turn", "position", "gb", "park_ms", "restore_ms", "prefill_ms"},
    "codec_window": {"precision", "ms", "estimator_ms", "scalar_ms", "first_ms", "snr_db", "audio_s", *PEAKS},
    "first_sound": {"resident", "prompt", "frames", "prefill_ms", "tokens_ms", "move_ms", "audio_ms", "s"},
    "end": {"seconds", "rows", "skipped", "error"},
}


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_every_line_has_its_fields(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.gpu", "--tiny", "--folder", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    text, found = process.stdout, rows(process.stdout)
    assert process.returncode == 0, process.stderr
    assert [row for row in found if row["bench"] in ("error", "skipped")] == []
    assert {row["bench"] for row in found} == FIELDS.keys()
    for row in found:
        assert FIELDS[row["bench"]] <= row.keys(), row["bench"]
    assert {row["model"] for row in found if "left_mb" in row} == {"lm", "codec"}
    assert {row["int8"] for row in found if row["bench"] == "frame"} == {"off", "decoder", "all"}
    assert len({row["precision"] for row in found if row["bench"] == "codec_window"}) == 5
    for name in FIELDS:
        assert f"**{name}**" in text, "a table is missing"
    assert list(tmp_path.iterdir()) == []


SIGNALS = pytest.mark.timeout(60, method="thread")  # the timer that signals is the report's


@SIGNALS
def test_nothing_begins_for_which_no_time_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    report, begun = Report(0.3), []
    with report.watched():
        assert report.measure("short", lambda: begun.append("short"), 0.1)
        assert not report.measure("long", lambda: begun.append("long"), 5)
        assert not report.measure("longer than expected", lambda: time.sleep(30), 0.1)
        assert not report.measure("late", lambda: begun.append("late"), 0.1)
    text = capsys.readouterr().out
    assert begun == ["short"]
    assert [row["what"] for row in rows(text)[:-1]] == ["long", "longer than expected", "late"]
    assert rows(text)[-1]["skipped"] == 3
    assert "**skipped**" in text
    assert not report.failed


@SIGNALS
def test_a_bench_that_is_stopped_says_what_it_has_and_cleans_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(60)

    def stopped() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    def run() -> None:
        with report.watched(), tempfile.TemporaryDirectory(dir=tmp_path):
            report.emit("device", name="a card")
            report.measure("frames", stopped, 1)

    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 128 + signal.SIGTERM
    text = capsys.readouterr().out
    assert [row["bench"] for row in rows(text)] == ["device", "end"]
    assert "| a card |" in text
    assert list(tmp_path.iterdir()) == []


def test_an_error_costs_its_own_measurement_alone(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(60)
    assert not report.measure("broken", lambda: 1 / 0, 1)
    assert report.measure("sound", lambda: None, 1)
    assert report.failed
    assert rows(capsys.readouterr().out)[0]["error"] == "ZeroDivisionError: division by zero"


def test_checkpoints_go_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not into memory where the models would not fit beside them."""
    monkeypatch.setattr(gpu, "_write_rate", lambda folder: 9e9 if folder == Path("/dev/shm") else 1e9)
    monkeypatch.setattr(gpu, "available_memory", lambda: 100e9)
    assert gpu.fastest_folder(files=1e6) == Path("/dev/shm")
    monkeypatch.setattr(gpu, "available_memory", lambda: 10e9)
    assert gpu.fastest_folder(files=1e6) != Path("/dev/shm")
    with pytest.raises(SystemExit, match="no folder has"):
        gpu.fastest_folder(files=1e18)
