"""Guidance, top-k and draw of one code for each song, in one call."""

import torch
from torch import Tensor
from torch.library import custom_op

from services.tokenizer_worker.model.kernels.operators import declare_launches


@custom_op("heartmula::sample", mutates_args=(), device_types="cpu")
def sample(
    logits: Tensor,
    noise: Tensor,
    temperature: Tensor,
    topk: Tensor,
    cfg_scale: Tensor,
    length: Tensor,
    least: Tensor,
    end: int,
) -> Tensor:
    """Draw a code of each of n songs, int64 ``[n]``, from ``logits [2 · n, V]``: conditional rows, then unconditional.

    ``temperature`` fp32, ``topk`` int64 and ``cfg_scale`` fp32 are ``[n]``; ``noise`` is one sample of Exp(1) a code,
    fp32 ``[n, V]``. Guidance is u + (c − u) · cfg_scale (Ho & Salimans 2022); with a cfg_scale of 1 the conditional row
    is taken as it is and the other is not looked at. A song of temperature 0 takes the first of its largest logits.
    Values below the k-th largest are out, ties with it stay; of the others the largest p / noise wins, the first of
    equals. Guidance and the division by the temperature are rounded to the dtype of the logits, p is fp32.

    A song whose ``length`` is below its ``least``, int64 ``[n]`` both, has only the codes below `end`, at least 1.
    """
    songs = len(topk)
    conditional, unconditional = logits[:songs], logits[songs:]
    apart = ((conditional - unconditional) * cfg_scale[:, None]).to(logits.dtype)
    guided = torch.where(cfg_scale[:, None] == 1, conditional, unconditional + apart)
    greedy = (temperature == 0)[:, None]
    scaled = (guided / temperature.masked_fill(temperature == 0, 1)[:, None]).to(logits.dtype)
    early = (length < least)[:, None]
    scaled = scaled.masked_fill(early & (torch.arange(scaled.shape[1], device=scaled.device) >= end), -torch.inf)
    kept = topk.masked_fill(temperature == 0, 1).clamp(max=scaled.shape[1])
    smallest = scaled.sort(1, descending=True).values.gather(1, kept[:, None] - 1)
    p = scaled.masked_fill(scaled < smallest, -torch.inf).softmax(1, dtype=torch.float32)
    return (p / noise.masked_fill(greedy, 1)).argmax(1)


@sample.register_kernel("cuda")
def _on_cuda(
    logits: Tensor,
    noise: Tensor,
    temperature: Tensor,
    topk: Tensor,
    cfg_scale: Tensor,
    length: Tensor,
    least: Tensor,
    end: int,
) -> Tensor:
    from services.tokenizer_worker.model.kernels.triton_kernels import sampling as kernels

    return kernels.sample(logits, noise, temperature, topk, cfg_scale, length, least, end)


@sample.register_fake
def _shape(logits: Tensor, noise: Tensor, temperature: Tensor, topk: Tensor, *rest: object) -> Tensor:
    return topk.new_empty(len(topk))


declare_launches(sample, lambda *_: 1)
