"""The benchmarks run and print their fields. Speed is not tested: `make bench` measures it."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import checkpoints
from tests.bench.__main__ import main
from tests.bench.device import check_device
from tests.bench.pair_side import codec, language_model
from tests.bench.pairs import alternate, interval
from tests.bench.sides import ROOT

FIELDS = {
    "machine": {"cpu", "device", "cores", "threads", "torch"},
    "lm_prefill": {"config", "songs", "native_ms", "native_peak_rss_mb"},
    "lm_frame": {"config", "songs", "native_ms", "native_peak_rss_mb", "frames_per_s", "native_kv_mb"},
    "lm_int8": {"config", "weights", "weights_mb", "logits_apart", "same_greedy"},
    "codec_precision": {"config", "arithmetic", "latents_apart", "snr_db", "spectral_convergence", "log_magnitude_db"},
    "encoder_chunk": {"config", "ms", "stem_ms", "query_ms", "stem_peak_rss_mb", "weights_mb", "work_estimate_mb"},
    "joins": {"config", "window", "join_at", "way", "least_snr_db", "mean_snr_db", "step_rank", "jump_rank"},
    "codec_window": {"config", "native_ms", "native_peak_rss_mb", "estimator_ms", "scalar_ms"},
}


def smoke(module: str, *options: str) -> tuple[str, list[dict[str, Any]]]:
    """Run a benchmark; returns all that it prints, and its JSON lines."""
    command = [sys.executable, "-m", module, "--smoke", *options]
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


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "--smoke"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as bench:
        while not list(tmp_path.glob("bench-*/HeartMuLa-oss-tiny/*.safetensors")):
            assert bench.poll() is None
            time.sleep(0.02)
        bench.terminate()
        text, _ = bench.communicate()
    assert bench.returncode == 128 + signal.SIGTERM
    assert "lm_int8" not in text  # it did not run to its end
    assert not list(tmp_path.glob("bench-*"))


def test_a_peak_of_memory_is_the_process_own(tmp_path: Path) -> None:
    """A parent that has 300 MB measures a child that has next to nothing."""
    held = b"\1" * 300_000_000
    command = [sys.executable, "-c", "from tests.bench.memory import peak_rss_mb; print(peak_rss_mb())"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 5 < int(run.stdout) < 100 < len(held) / 1e6
    grow = [*command[:-1], "b'1' * 200_000_000; " + command[-1]]
    run = subprocess.run(grow, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 200 < int(run.stdout) < 300


def test_a_device_that_pytorch_lacks_is_reported(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCH_DEVICE", "cuda:7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "none")
    monkeypatch.setattr(sys, "argv", ["tests.bench", "lm_mid"])
    with pytest.raises(SystemExit, match=r"^1$"):
        main()
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "BENCH_DEVICE=cuda:7 needs" in printed.err
    assert "unset BENCH_DEVICE" in printed.err
    assert "Traceback" not in printed.err
    for device in ("cpu", "cpu:0"):
        check_device(device)
    for device in ("gpu", "meta", "cuda:x"):
        with pytest.raises(SystemExit, match=r"set it to cpu, cuda or cuda:N"):
            check_device(device)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(SystemExit, match="is a build for the CPU: install another build"):
        check_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a card"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    with pytest.raises(SystemExit, match="the last card is cuda:1"):
        check_device("cuda:2")


@pytest.mark.slow
def test_pairs_compare_this_checkout_with_another() -> None:
    command = [sys.executable, "-m", "tests.bench.pairs", str(ROOT), "frame-float32-2", "--smoke", "--pairs", "7"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    _, row = [json.loads(line) for line in run.stdout.splitlines()]
    assert {"case", "here_ms", "base_ms", "ratio", "interval", "slower"} <= row.keys()
    low, high = row["interval"]
    assert low <= row["ratio"] <= high
    assert run.returncode == int(row["slower"] is True)


def test_a_side_of_a_pair_makes_frames_and_a_window(tmp_path: Path) -> None:
    checkpoint = checkpoints.golden(tmp_path)
    for part in ("prefill", "frame"):
        language_model(checkpoint, "float32", 2, part)()
    codec(checkpoint, "float32")()


def test_pairs_change_their_order_and_their_interval_holds_the_median() -> None:
    turns: list[str] = []

    def side(name: str, ms: float) -> float:
        turns.append(name)
        return ms

    assert alternate(partial(side, "here", 2.0), partial(side, "base", 1.0), 3) == [(2.0, 1.0)] * 3
    assert turns == ["here", "base", "base", "here", "here", "base", "base", "here"]
    low, high = interval([0.9, 1.0, 1.0, 1.1, 1.2, 1.3, 5.0])
    assert 1.0 <= low <= 1.1 <= high <= 1.3
