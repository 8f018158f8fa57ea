"""The native codec engine: this project's own HeartCodec behind the `CodecEngine` interface."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from services.codec_worker.engines.base import DecodeStep
from services.codec_worker.model import ConvCache, EulerSolver, HeartCodec, Schedule, Splicer, WindowPlan, load_weights
from services.codec_worker.model.flow_matching import GUIDANCE, STEPS
from shared.errors import DeviceFull, PhaseError
from shared.model.checkpoint import Checkpoint
from shared.model.weights import Weights, device_memory

STRETCH = 62  # latents that the waveform decoder takes at once: a twelfth of a window


class NativeCodec:
    """Decodes songs window by window on the CPU or one CUDA device, one song at a time.

    `dtype` is that of the estimator's matrices: float32, bfloat16 or float16. A window takes `steps` Euler steps with
    `guidance`, which halves their work where it is 1. A song is decoded the same way however often it is
    decoded: the noise of each window follows from the song's seed and the window's index alone.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, checkpoint: Checkpoint, device: str, dtype: str, *, steps: int = STEPS, guidance: float = GUIDANCE
    ) -> None:
        self.sample_rate = checkpoint.codec.sample_rate
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        with torch.device("meta"):
            self._model = HeartCodec(checkpoint.codec, getattr(torch, dtype))
        self._weights = Weights(self._model, self._device, host_only=self._model.time_weights)
        self._steps, self._guidance = steps, guidance
        self._schedule: Schedule | None = None  # on the host, from `load` on
        self._ready: Schedule | None = None  # on the device, as long as the weights are

    @property
    def weight_bytes(self) -> int:
        """Bytes that `to_device` moves."""
        return self._weights.nbytes

    @property
    def work_bytes(self) -> int:
        """Bytes that one window needs beside the weights; an upper estimate."""
        return self._model.work_bytes(2 * self._plan(1).window, STRETCH)

    def load(self) -> None:
        """Read the weights into host memory. Raises `ConfigError`."""
        self._weights.load(lambda: load_weights(self._model, self._checkpoint.codec_path))
        with torch.inference_mode():
            self._schedule = Schedule(self._model.estimator, self._steps)

    def to_device(self) -> None:
        """Move the weights to the device.

        Raises `PhaseError` before `load`, and `DeviceFull` with the weights back on the host.
        """
        self._weights.to_device()
        assert self._schedule is not None
        try:
            with torch.inference_mode(), device_memory():
                self._ready = self._schedule.to(self._device)
        except DeviceFull:
            self.to_host()
            raise

    def to_host(self) -> None:
        """Drop the device's copy of the weights, and give its memory back to the driver."""
        self._ready = None
        self._weights.to_host()

    def decode(self, codes: np.ndarray, *, seed: int) -> Iterator[DecodeStep]:
        """Decode int16 codes ``[8, L]``: a window takes its Euler steps and one for each stretch of its waveform.

        Codes outside the codebooks add nothing. Raises `ValueError` for codes of another shape or an empty song,
        `PhaseError` when the weights are not on the device, `DeviceFull`.
        """
        if codes.ndim != 2 or codes.shape[0] != self._checkpoint.codec.num_quantizers or codes.shape[1] == 0:
            raise ValueError(f"codes of shape {list(codes.shape)} are not a song")
        if self._ready is None:
            raise PhaseError("the codec is not on the device")
        return _guarded(self._decode(codes, seed, self._ready))

    def _plan(self, frames: int) -> WindowPlan:
        return WindowPlan(frames, self.sample_rate)

    def _decode(self, codes: np.ndarray, seed: int, schedule: Schedule) -> Iterator[DecodeStep]:
        plan = self._plan(codes.shape[1])
        splicer, context = Splicer(plan), torch.zeros(0, self._checkpoint.codec.out_channels, device=self._device)
        stretches = [range(0, plan.needed(index), STRETCH) for index in range(plan.count)]
        done, total = 0, plan.count * len(schedule) + sum(map(len, stretches))
        for index in range(plan.count):
            solver = self._begin(plan.cut(codes, index), noise(seed, index, plan, context.shape[1]), context, schedule)
            while not solver.finished:
                self._advance(solver)
                done += 1
                yield DecodeStep(done, total)
            context, conv_cache = solver.latents[-plan.context :], ConvCache()
            for start in stretches[index]:
                stop = min(start + STRETCH, stretches[index].stop)
                audio = splicer.add(self._waveform(solver.latents, start, stop, conv_cache))
                done += 1
                yield DecodeStep(done, total, audio)

    # Inference mode is entered within each step: around a generator it would leak into its caller.

    @torch.inference_mode()
    def _begin(self, codes: np.ndarray, noise: Tensor, context: Tensor, schedule: Schedule) -> EulerSolver:
        mu = self._model.quantizer(torch.from_numpy(codes.astype(np.int64)).to(self._device))
        return EulerSolver(self._model.estimator, schedule, mu, noise.to(self._device), context, self._guidance)

    @torch.inference_mode()
    def _advance(self, solver: EulerSolver) -> None:
        solver.step()

    @torch.inference_mode()
    def _waveform(self, latents: Tensor, start: int, stop: int, conv_cache: ConvCache) -> np.ndarray:
        waveform: np.ndarray = self._model.scalar(latents, start, stop, conv_cache).cpu().numpy()
        return waveform


def _guarded(steps: Iterator[DecodeStep]) -> Iterator[DecodeStep]:
    with device_memory():
        yield from steps


def noise(seed: int, window: int, plan: WindowPlan, channels: int) -> Tensor:
    """Noise at the start of a window, fp32 ``[latents, channels]``; drawn on the host, so all devices start alike."""
    mixed = np.random.SeedSequence((seed, window)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> np.uint64(1)))
    return torch.randn(2 * plan.window, channels, generator=generator)
