"""The bench runs and says what it should; how fast is for `make bench` to find out."""

import json
import subprocess
import sys

from tests.bench.__main__ import ROOT

FIELDS = {
    "machine": {"cpu", "cores", "threads", "torch"},
    "lm_prefill": {"config", "songs", "native_ms", "native_peak_rss_mb"},
    "lm_frame": {"config", "songs", "native_ms", "native_peak_rss_mb", "frames_per_s", "native_kv_mb"},
    "lm_int8": {"config", "weights", "weights_mb", "logits_apart", "same_greedy"},
    "codec_window": {"config", "native_ms", "native_peak_rss_mb", "estimator_ms", "scalar_ms"},
}


def test_smoke() -> None:
    command = [sys.executable, "-m", "tests.bench", "--smoke"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert {row["bench"] for row in rows} == FIELDS.keys()
    for row in rows:
        assert FIELDS[row["bench"]] <= row.keys()
    alone = next(row for row in rows if row["bench"] == "lm_frame")
    assert {"weights_gb_per_s", "matvec_gb_per_s", "of_matvec"} <= alone.keys()
    assert "| bench | config |" in run.stdout
