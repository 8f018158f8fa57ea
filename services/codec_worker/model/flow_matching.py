"""Flow matching: from noise to latents in a few Euler steps, with guidance and the context of the previous window."""

from copy import copy

import torch
from torch import Tensor

from services.codec_worker.model.estimator import Estimator, Modulation

STEPS = 10
GUIDANCE = 1.25
SIGMA_MIN = 1e-6


class Schedule:
    """The times of the Euler steps and everything that depends on them alone; shared by all windows."""

    def __init__(self, estimator: Estimator, steps: int = STEPS) -> None:
        ends = torch.linspace(0, 1, steps + 1)
        # Summed up in fp32 rather than taken from `ends`: the reference does, and the latents follow the last bit.
        t, dt, times, lengths = ends[0], ends[1] - ends[0], [], []
        for k in range(1, steps + 1):
            times.append(t)
            lengths.append(dt)
            t = t + dt
            if k < steps:
                dt = ends[k + 1] - t
        self.times = torch.stack(times)  # [steps] fp32
        self.lengths = torch.stack(lengths)  # [steps] fp32
        self.modulation: Modulation = estimator.modulation(self.times)

    def to(self, device: torch.device) -> "Schedule":
        """Copy of the schedule with its modulation on a device."""
        moved = copy(self)
        moved.modulation = self.modulation.to(device)
        return moved

    def __len__(self) -> int:
        return len(self.times)


class EulerSolver:
    """One window on its way from noise to latents.

    All in fp32: `noise` ``[T, 256]``; `mu` ``[T, dim]``; `context` ``[n, 256]``, the latents that the window begins
    with (n may be 0). With `guidance` ≤ 1 a single row is computed, else an unconditional one beside it
    (Ho & Salimans 2022).
    """

    def __init__(
        self, estimator: Estimator, schedule: Schedule, mu: Tensor, noise: Tensor, context: Tensor, guidance: float
    ) -> None:
        self._estimator, self._schedule, self._guidance = estimator, schedule, guidance
        self._noise, self._context = noise, context
        self._x = noise.clone()
        padded = torch.zeros_like(noise)
        padded[: len(context)] = context
        fixed = torch.cat((padded, mu), dim=-1)  # [T, 256 + dim]
        if guidance > 1:
            unconditional = fixed.clone()
            unconditional[:, noise.shape[1] :] = 0
            self._fixed = torch.stack((unconditional, fixed))  # [2, T, 256 + dim]
        else:
            self._fixed = fixed[None]
        self._done = 0

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self._done == len(self._schedule)

    @property
    def latents(self) -> Tensor:
        """Present latents of the window, ``[T, 256]`` fp32; final once `finished`."""
        return self._x

    def inputs(self) -> Tensor:
        """Inputs of the estimator in the next step, ``[rows, T, in_channels]``, with the context in its place."""
        t, n = self._schedule.times[self._done], len(self._context)
        self._x[:n] = (1 - (1 - SIGMA_MIN) * t) * self._noise[:n] + t * self._context
        return torch.cat((self._x.expand(len(self._fixed), -1, -1), self._fixed), dim=-1)

    def step(self) -> None:
        """Run one Euler step."""
        velocity = self._estimator(self.inputs(), self._schedule.modulation, self._done)
        if self._guidance > 1:
            unconditional, conditional = velocity
            guided = unconditional + self._guidance * (conditional - unconditional)
        else:
            guided = velocity[0]
        self._x = self._x + self._schedule.lengths[self._done] * guided
        self._done += 1
        if self.finished:
            self._x[: len(self._context)] = self._context
