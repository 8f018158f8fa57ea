"""The native codec engine: this project's own HeartCodec behind the `CodecEngine` interface."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from services.codec_worker.engines.base import NOTHING_KEPT, DecodeState, DecodeStep, DecodeSteps, KeptWindows
from services.codec_worker.engines.decode_state import digest
from services.codec_worker.engines.identity import identity_of
from services.codec_worker.model import (
    ConvCache,
    EulerSolver,
    HeartCodec,
    Schedule,
    Splicer,
    WindowPlan,
    fused_attention,
    load_weights,
    products,
)
from services.codec_worker.model.flow_matching import GUIDANCE, STEPS
from shared.errors import DeviceFull, PhaseError
from shared.model.checkpoint import Checkpoint
from shared.model.sizes import STRETCH_LATENTS, codec_work
from shared.model.weights import Weights, device_memory, free_unused

STRETCH = STRETCH_LATENTS  # that the waveform decoder takes at once: a twelfth of a window


class NativeCodec:
    """Decodes songs window by window on the CPU or one CUDA device, one song at a time.

    `dtype` is that of the estimator's matrices: float32, bfloat16 or float16. On CUDA float32 means float32 in memory
    and TF32 factors in the estimator's products; the waveform decoder is float32 throughout.

    A window takes `steps` Euler steps with `guidance`, which halves their work where it is 1. A song is decoded the
    same way however often it is decoded: the noise of each window follows from a seed and the window's index alone. The
    seed is the song's, but for windows that it shares with a song that it goes on from. In the window where the two
    part, the other song's latents up to there are known, and are given to the solver as its context.
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

    @cached_property
    def identity(self) -> str:
        """The weights and the settings. Raises `OSError` when the checkpoint is gone."""
        return identity_of("native", self._checkpoint, self._steps, self._guidance)

    @property
    def weight_bytes(self) -> int:
        """Bytes that `to_device` moves."""
        return self._weights.nbytes

    @property
    def work_bytes(self) -> int:
        """Bytes that one window needs beside the weights; an upper estimate."""
        return codec_work(self._checkpoint.codec)

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

    def decode(self, codes: np.ndarray, *, seed: int) -> DecodeSteps:
        """Decode int16 codes ``[8, L]``: a window takes its Euler steps and one for each stretch of its waveform.

        Codes outside the codebooks add nothing. Raises `ValueError` for codes of another shape or an empty song,
        `PhaseError` when the weights are not on the device, `DeviceFull`.
        """
        return self.advance(DecodeState(seed=seed), codes, ended=True)

    def advance(
        self, state: DecodeState, codes: np.ndarray, *, ended: bool, kept: KeptWindows = NOTHING_KEPT
    ) -> DecodeSteps:
        """Decode what is final of a song after `state`, given its codes so far, int16 ``[8, T]``.

        Window n is final when its 372 codes, from 320 · n on, are there: then 320 of them sound, and the last 52 with
        the next window. The song's last window, and a song shorter than a window, are final with the song's end.
        The last step of a window has the state after it, unless the song ends with it. A window in which the song
        parts from earlier ones takes the Euler steps once more for each of them. Raises as `decode`, and `ValueError`
        for codes or `kept` windows that do not continue those that `state` comes from, or are another codec's.
        """
        if codes.ndim != 2 or codes.shape[0] != self._checkpoint.codec.num_quantizers or (ended and not codes.size):
            raise ValueError(f"codes of shape {list(codes.shape)} are not a song")
        if self._ready is None:
            raise PhaseError("the codec is not on the device")
        plan = WindowPlan(codes.shape[1], self.sample_rate, ended=ended)
        if state.window:  # else there is nothing to fit
            self._check_state(state, codes, plan, kept)
        if any(found.codes.shape != (len(codes), plan.window) for found in kept.earlier):
            raise ValueError(f"what the song keeps of another one is not in windows of {plan.window} codes")
        return self._released(self._decode(plan, codes, state, kept, self._ready))

    def _check_state(self, state: DecodeState, codes: np.ndarray, plan: WindowPlan, kept: KeptWindows) -> None:
        shapes = (plan.context, self._checkpoint.codec.out_channels), (2, plan.overlap_samples)
        if (state.context.shape, state.overlap.shape) != shapes:
            raise ValueError(f"a state of {state.context.shape} and {state.overlap.shape} is not of this codec")
        if not state.continues(codes, kept):
            raise ValueError("these codes do not begin with those that were decoded before")

    def _released(self, steps: DecodeSteps) -> DecodeSteps:
        """Steps after which the device's work memory goes back to the driver, however they end.

        It would stay with this process, some gigabyte of it, while the ledger has it for free: another process could
        not use it. Allocating it again takes milliseconds a song.
        """
        try:
            with device_memory():
                yield from steps
        finally:
            free_unused(self._device)

    def _decode(
        self, plan: WindowPlan, codes: np.ndarray, state: DecodeState, kept: KeptWindows, schedule: Schedule
    ) -> DecodeSteps:
        stretches = {index: range(0, plan.needed(index), STRETCH) for index in range(state.window, plan.count)}
        solutions = {index: _solutions(plan, codes, index, state.seed, kept) for index in stretches}
        done = 0
        total = sum(map(len, solutions.values())) * len(schedule) + sum(map(len, stretches.values()))
        if not stretches and plan.ended and state.samples < plan.samples:  # the song ended with a window's last code
            yield DecodeStep(1, 1, np.ascontiguousarray(state.overlap.T))
        overlap = state.overlap if state.window else None
        splicer = Splicer(plan, window=state.window, emitted=state.samples, overlap=overlap)
        for index, starts in stretches.items():
            known, conv_cache = self._context(state), ConvCache()
            left = len(solutions[index]) * len(schedule) + len(starts)
            for solution in solutions[index]:
                solver = self._begin(solution, index, plan, known, schedule)
                while not solver.finished:
                    self._advance(solver)
                    done, left = done + 1, left - 1
                    yield DecodeStep(done, total, window_left=left)
                known = solver.latents[: solution.known]
            for start in starts:
                stop, after = min(start + STRETCH, starts.stop), None
                audio = splicer.add(self._waveform(solver.latents, start, stop, conv_cache))
                if stop == starts.stop and not plan.is_last(index):
                    state = after = self._after(plan, codes, state, kept, solver, splicer)
                done, left = done + 1, left - 1
                yield DecodeStep(done, total, audio, after, left)

    # Inference mode is entered within each step: around a generator it would leak into its caller. TF32 is for the
    # estimator alone: a rounding error of the waveform decoder is noise in the song, and it is 7 % of the work.

    def _context(self, state: DecodeState) -> Tensor:
        """The last latents of the window before, ``[n, channels]`` on the host; none before the first window."""
        return torch.from_numpy(state.context).view(-1, self._checkpoint.codec.out_channels)

    @torch.inference_mode()
    @products(tf32=False)
    def _begin(
        self, solution: "_Solution", index: int, plan: WindowPlan, known: Tensor, schedule: Schedule
    ) -> EulerSolver:
        mu = self._model.quantizer(torch.from_numpy(solution.codes.astype(np.int64)).to(self._device))
        start = noise(solution.seed, index, plan, self._checkpoint.codec.out_channels).to(self._device)
        return EulerSolver(self._model.estimator, schedule, mu, start, known.to(self._device), self._guidance)

    @torch.inference_mode()
    def _after(
        self,
        plan: WindowPlan,
        codes: np.ndarray,
        state: DecodeState,
        kept: KeptWindows,
        solver: EulerSolver,
        splicer: Splicer,
    ) -> DecodeState:
        """The state after the window that `solver` and `splicer` have finished, all of it on the host."""
        return DecodeState(
            seed=state.seed,
            window=state.window + 1,
            samples=splicer.emitted,
            taken=plan.end(state.window),
            codes=digest(codes[:, : plan.end(state.window)]),
            kept=kept.digest,
            context=solver.latents[-plan.context :].cpu().numpy().copy(),  # a view would keep all latents
            overlap=splicer.overlap.copy(),
        )

    @torch.inference_mode()
    def _advance(self, solver: EulerSolver) -> None:
        with products(tf32=True), fused_attention():
            solver.step()

    @torch.inference_mode()
    @products(tf32=False)
    def _waveform(self, latents: Tensor, start: int, stop: int, conv_cache: ConvCache) -> np.ndarray:
        waveform: np.ndarray = self._model.scalar(latents, start, stop, conv_cache).cpu().numpy()
        return waveform


@dataclass(frozen=True, kw_only=True, eq=False)
class _Solution:
    """One way from noise to latents of a window: that of an earlier song, or at last of the song itself."""

    codes: np.ndarray  # int16 [8, window]
    seed: int  # of the noise
    known: int  # first latents that the next solution takes over


def _solutions(plan: WindowPlan, codes: np.ndarray, index: int, seed: int, kept: KeptWindows) -> list[_Solution]:
    """What has to be solved for a window, the earlier songs' first. `seed` is that of the song.

    Latents that the window before determines already need no earlier song.
    """
    determined = plan.context if index else 0
    found = [
        _Solution(codes=earlier.codes, seed=earlier.seed, known=known)
        for earlier in kept.parting(index)
        if (known := 2 * (earlier.frames - index * plan.hop)) > determined
    ]
    return [*found, _Solution(codes=plan.cut(codes, index), seed=kept.seed(index, seed), known=0)]


def noise(seed: int, window: int, plan: WindowPlan, channels: int) -> Tensor:
    """Noise at the start of a window, fp32 ``[latents, channels]``; drawn on the host, so all devices start alike."""
    mixed = np.random.SeedSequence((seed, window)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> np.uint64(1)))
    return torch.randn(2 * plan.window, channels, generator=generator)
