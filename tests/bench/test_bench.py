"""The benchmarks run and print their fields. Speed is not tested: `make bench` measures it."""

import json
import subprocess
import sys
from typing import Any

from tests.bench.__main__ import ROOT

FIELDS = {
    "machine": {"cpu", "cores", "threads", "torch"},
    "lm_prefill": {"config", "songs", "native_ms", "native_peak_rss_mb"},
    "lm_frame": {"config", "songs", "native_ms", "native_peak_rss_mb", "frames_per_s", "native_kv_mb"},
    "lm_int8": {"config", "weights", "weights_mb", "logits_apart", "same_greedy"},
    "codec_window": {"config", "native_ms", "native_peak_rss_mb", "estimator_ms", "scalar_ms"},
}


def smoke(module: str) -> tuple[str, list[dict[str, Any]]]:
    """Run a benchmark; returns all that it prints, and its JSON lines."""
    command = [sys.executable, "-m", module, "--smoke"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout, [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_the_bench_of_the_gateway_runs() -> None:
    _, (posts, sockets) = smoke("tests.bench.gateway")
    assert {"posts_per_s", "post_ms_p50", "post_ms_p99", "publish_ms_p50", "publish_ms_p99"} <= posts.keys()
    assert {"latency_ms_p50", "latency_ms_p99", "core_percent", "kib_per_socket"} <= sockets.keys()
    assert sockets["received"] == 20 * 10


def test_the_bench_of_the_engines_runs() -> None:
    text, rows = smoke("tests.bench")
    assert {row["bench"] for row in rows} == FIELDS.keys()
    for row in rows:
        assert FIELDS[row["bench"]] <= row.keys()
    alone = next(row for row in rows if row["bench"] == "lm_frame")
    assert {"weights_gb_per_s", "matvec_gb_per_s", "of_matvec"} <= alone.keys()
    assert "| bench | config |" in text


def test_pairs_compare_this_checkout_with_another() -> None:
    command = [sys.executable, "-m", "tests.bench.pairs", str(ROOT), "frame-float32-2", "--smoke", "--pairs", "7"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    _, row = [json.loads(line) for line in run.stdout.splitlines()]
    assert {"case", "here_ms", "base_ms", "ratio", "interval", "slower"} <= row.keys()
    low, high = row["interval"]
    assert low <= row["ratio"] <= high
    assert run.returncode == int(row["slower"] is True)
