"""The training loop that both networks share: resumable, with a progress bar."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

WARM_UP = 0.02  # of all steps
SAVED_EVERY = 250  # steps

Loss = Callable[[np.random.Generator], Tensor]
"""Draws a batch and returns its loss, a scalar."""


def train(
    model: nn.Module,
    loss: Loss,
    steps: int,
    *,
    path: Path,
    seed: int,
    rate: float,
    muon: Callable[[str], bool],
) -> None:
    """Minimise `loss` over the model's parameters; go on from `path` where that exists, and keep it up to date.

    The matrices whose names `muon` accepts are optimised by Muon (Jordan et al. 2024), which needs a fraction of the
    steps, all else by AdamW (Loshchilov & Hutter 2019); both at `rate`, which warms up and falls as a cosine. Batch n
    depends on `seed` and n alone, so a run that was interrupted sees what it would have seen.
    """
    model.requires_grad_(True)
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and muon(name)]
    others = [p for name, p in named.items() if not (p.ndim == 2 and muon(name))]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.01),
    ]
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["step"]

    def save(step: int) -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        scratch = path.with_suffix(".new")
        torch.save({"step": step, "model": model.state_dict(), "optimizers": states}, scratch)
        scratch.rename(path)

    average, step = math.nan, first
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, refresh_per_second=1) as bar:
        task = bar.add_task(path.stem, total=steps, completed=first, loss=average)
        while step < steps:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * schedule(step / steps)
                optimizer.zero_grad()
            value = loss(np.random.default_rng((seed, step)))
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            average = value.item() if math.isnan(average) else 0.98 * average + 0.02 * value.item()
            bar.update(task, completed=step, loss=average)
            if step % SAVED_EVERY == 0 or step == steps:
                save(step)
    model.requires_grad_(False)


def schedule(done: float) -> float:
    """Share of the full learning rate, given the share of the steps that are done."""
    return min(done / WARM_UP + 1e-3, 1.0) * (0.02 + 0.98 * math.cos(math.pi / 2 * done) ** 2)
