"""Guidance and sampling: one code for each song, from the logits of one codebook.

`HeartMuLa.next_frame` draws a frame's codes with it, codebook by codebook. Noise is handed in, so that songs can be
repeated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """Sampling parameters of a batch of songs. Guided songs come first, and rows are in the order of `spread`.

    Temperatures, top-k and scales are one of each a song; of the scales only those of the guided songs count. A greedy
    song, of temperature 0, draws among its largest logit alone.
    """

    BYTES = 17  # on the device, a song

    def __init__(
        self,
        temperature: Sequence[float],
        topk: Sequence[int],
        cfg_scale: Sequence[float],
        device: torch.device | None = None,
    ) -> None:
        kept = [k if t > 0 else 1 for k, t in zip(topk, temperature, strict=True)]
        self._most = max(kept)
        self._greedy = torch.tensor([t == 0 for t in temperature], device=device)[:, None]
        self._temperature = torch.tensor([t or 1 for t in temperature], dtype=torch.float32, device=device)[:, None]
        self._topk = torch.tensor(kept, device=device)[:, None]
        self._cfg_scale = torch.tensor(cfg_scale, dtype=torch.float32, device=device)[:, None]

    def guide(self, logits: Tensor) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022): ``[rows, V]`` → ``u + (c − u) · cfg``, ``[songs, V]``.

        The single row of a song without guidance is taken as it is.
        """
        songs = len(self._topk)
        guided = len(logits) - songs
        if guided == 0:
            return logits
        unconditional = logits[songs:]
        # Scales are fp32 also where logits are not: only the product is rounded.
        apart = ((logits[:guided] - unconditional) * self._cfg_scale[:guided]).to(logits.dtype)
        return torch.cat((unconditional + apart, logits[guided:songs]))

    def draw(self, logits: Tensor, noise: Tensor, barred: Tensor | None = None) -> Tensor:
        """Draw a code of each song, int64 ``[songs]``, from ``logits [rows, V]`` before guidance.

        `noise` is one sample of Exp(1) a code, fp32 ``[songs, V]``: dividing probabilities by it and taking the largest
        is an exact draw (the exponential race). Codes that are `barred`, bool ``[songs, V]``, are as if there were no
        such codes. Of the others values below the k-th largest are out; ties with it stay. Guidance and the division by
        the temperature end in the dtype of the logits, as in the reference.
        """
        scaled = (self.guide(logits) / self._temperature).to(logits.dtype)
        if barred is not None:
            scaled = scaled.masked_fill(barred, -torch.inf)
        largest = scaled.topk(min(self._most, scaled.shape[1])).values
        smallest = largest.gather(1, self._topk.clamp(max=largest.shape[1]) - 1)
        # fp32 as autocast has it on CUDA: 16 bits cannot tell 8,197 probabilities apart.
        p = scaled.masked_fill(scaled < smallest, -torch.inf).softmax(1, dtype=torch.float32)
        return (p / noise.masked_fill(self._greedy, 1)).argmax(1)
