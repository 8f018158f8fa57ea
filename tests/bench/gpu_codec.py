"""The codec on a card: a window by precision and by part, and how long a song's first sound takes."""

import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor

from services.codec_worker.engines.native import STRETCH, NativeCodec, noise
from services.codec_worker.model import ConvCache, EulerSolver, WindowPlan, fused_attention, products
from services.codec_worker.model.flow_matching import GUIDANCE
from services.codec_worker.model.windows import WINDOW
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from shared.errors import DeviceFull
from shared.model.checkpoint import Checkpoint
from tests.bench.gpu_device import Device
from tests.bench.gpu_report import Report
from tests.gpu.engines import codes_of, prompt_of, take


@dataclass(frozen=True)
class Precision:
    """What the factors of float32 products are rounded to, in the codec's two parts."""

    dtype: str  # of the estimator's matrices
    estimator_tf32: bool
    waveform_tf32: bool


PRECISIONS = {
    "float32": Precision("float32", False, False),
    "tf32 estimator": Precision("float32", True, False),
    "tf32": Precision("float32", True, True),
    "bfloat16": Precision("bfloat16", False, False),
    "bfloat16, tf32 waveform": Precision("bfloat16", False, True),
}


class Codec:
    """A codec on the device, in one dtype after the other, and its measurements."""

    def __init__(self, device: Device, report: Report, checkpoint: Checkpoint, steps: int) -> None:
        self.device, self.report, self.checkpoint, self.steps = device, report, checkpoint, steps
        self.engine: NativeCodec | None = None
        self._exact: Tensor | None = None  # waveform in float32
        self._codes = codes_of(checkpoint, WINDOW)[: checkpoint.codec.num_quantizers]

    def load(self, dtype: str) -> None:
        """Read the checkpoint and move the weights to the device, twice: the first time they are page-locked."""
        self.release()
        engine, device = NativeCodec(self.checkpoint, self.device.name, dtype, steps=self.steps), self.device
        began = time.perf_counter()
        engine.load()
        seconds, gb = time.perf_counter() - began, engine.weight_bytes / 1e9
        before = device.used()
        first = device.milliseconds(engine.to_device)
        away = device.milliseconds(engine.to_host)
        left = device.used() - before
        again = device.milliseconds(engine.to_device)
        self.report.emit("load", model="codec", dtype=dtype, s=round(seconds, 2), gb_per_s=round(gb / seconds, 2))
        self.report.emit(
            "move",
            model="codec",
            dtype=dtype,
            gb=round(gb, 3),
            first_ms=round(first, 1),
            to_device_ms=round(again, 1),
            to_host_ms=round(away, 1),
            left_mb=round(left / 1e6, 1),
        )
        self.engine = engine

    def release(self) -> None:
        """Give up the weights, on the device and in host memory."""
        if self.engine is not None:
            self.engine.to_host()
        self.engine = None

    def windows(self, dtype: str, rounds: int) -> None:
        """Measure every precision that has its matrices in this dtype."""
        self.load(dtype)
        for name, precision in PRECISIONS.items():
            if precision.dtype == dtype:
                self._window(name, precision, rounds)

    @torch.inference_mode()
    def _window(self, name: str, precision: Precision, rounds: int) -> None:
        self.device.forget_peaks()
        first = self._decode(precision)
        taken = [self._decode(precision) for _ in range(rounds)] or [first]
        waveform = taken[-1][2]
        if name == "float32":
            self._exact = waveform
        estimator, scalar = (median(part) for part in list(zip(*taken, strict=True))[:2])
        self.report.emit(
            "codec_window",
            precision=name,
            ms=round(estimator + scalar, 2),
            estimator_ms=round(estimator, 2),
            scalar_ms=round(scalar, 2),
            first_ms=round(first[0] + first[1], 1),
            snr_db=_snr(waveform, self._exact),
            audio_s=round(WINDOW * 0.08, 2),
            **self.device.peaks(),
        )

    def _decode(self, precision: Precision) -> tuple[float, float, Tensor]:
        """Milliseconds of the estimator and of the waveform decoder for one whole window, and its waveform."""
        engine, device = self.engine, self.device
        assert engine is not None
        schedule, model = engine._ready, engine._model
        assert schedule is not None
        plan, channels = WindowPlan(WINDOW, engine.sample_rate), self.checkpoint.codec.out_channels
        mu = model.quantizer(torch.from_numpy(plan.cut(self._codes, 0).astype(np.int64)).to(device.name))
        start = noise(1, 0, plan, channels).to(device.name)
        solver = EulerSolver(
            model.estimator, schedule, mu, start, torch.zeros(0, channels, device=device.name), GUIDANCE
        )
        waveform: list[Tensor] = []

        def solve() -> None:
            with products(tf32=precision.estimator_tf32), fused_attention():
                while not solver.finished:
                    solver.step()

        def decode() -> None:
            cache, needed = ConvCache(), plan.needed(0)
            with products(tf32=precision.waveform_tf32):
                for first in range(0, needed, STRETCH):
                    part = model.scalar(solver.latents, first, min(first + STRETCH, needed), cache)
                    waveform.append(part.cpu())

        estimator = device.milliseconds(solve)
        scalar = device.milliseconds(decode)
        return estimator, scalar, torch.cat(waveform, dim=-1)


def first_sound(report: Report, lm: NativeEngine, codec: NativeCodec, prompt: int, frames: int) -> None:
    """From a prompt to the first stretch of audio, with both models on the device or, without room, in turns."""
    if lm._device.type == "cuda":
        take(lm, "graphs")
    resident = True
    try:
        lm.to_device()
        codec.to_device()
    except DeviceFull:
        resident = False
        codec.to_host()
        lm.to_device()
    song = Song(prompt=prompt_of(prompt), max_frames=frames, seed=1)
    began = time.perf_counter()
    lm.admit("song", song)
    if lm._device.type == "cuda":
        torch.cuda.synchronize(lm._device)
    admitted = time.perf_counter()
    made: list[np.ndarray] = []
    while lm._songs:
        made += [frame for frame in lm.step().values() if frame is not None]
    tokens = time.perf_counter()
    if not resident:
        lm.to_host()
        codec.to_device()
    moved = time.perf_counter()
    for step in codec.decode(np.stack(made, axis=1), seed=1):
        if step.audio is not None:
            break
    ended = time.perf_counter()
    report.emit(
        "first_sound",
        resident=resident,
        prompt=prompt,
        frames=len(made),
        prefill_ms=round((admitted - began) * 1000, 1),
        tokens_ms=round((tokens - admitted) * 1000, 1),
        move_ms=round((moved - tokens) * 1000, 1),
        audio_ms=round((ended - moved) * 1000, 1),
        s=round(ended - began, 3),
    )


def _snr(other: Tensor, wanted: Tensor | None) -> float | None:
    """Signal-to-noise ratio in dB; None where both are equal, or there is nothing to compare with."""
    if wanted is None or torch.equal(other, wanted):
        return None
    return round(float(10 * torch.log10(wanted.double().square().sum() / (other - wanted).double().square().sum())), 1)
