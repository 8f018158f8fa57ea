"""Guidance, top-k and draw: one program a song, which holds the whole vocabulary in registers.

The k-th largest value is found without sorting. Values are mapped to unsigned integers that compare as they do; the
bits of the k-th largest key are chosen from the highest on, two in a pass, by counting how many keys reach each of the
three candidates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Lowest bit of a value's fp32 form that can be set, rounded down to an even one: those below need no pass.
_LOWEST_BIT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 12}
# Three counts share an int64, 21 bits each.
_LARGEST_VOCABULARY = (1 << 21) - 1


@triton.jit
def _ordered(x):
    """Keys, uint32, that compare as the fp32 values do; those of 0 and −0 are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def _value(keys):
    """The fp32 values of keys: kept in place of both, they take half the registers."""
    bits = tl.where(keys >> 31 != 0, keys ^ 0x80000000, keys ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(keys, k, LOWEST: tl.constexpr):
    """A bound that exactly the keys from the k-th largest on reach, ties with it among them."""
    bound = tl.full((), 0, tl.uint32)
    reached = tl.full((), -1, tl.int64)  # how many keys reach `bound`, where it is known
    shift = tl.full((), 30, tl.int32)
    # As soon as k keys reach the bound, no key lies between it and the k-th largest: further bits change nothing.
    while (shift >= LOWEST) & (reached != k):
        step = tl.full((), 1, tl.uint32) << shift.to(tl.uint32)
        first = (keys >= bound + step).to(tl.int64)
        second = (keys >= bound + 2 * step).to(tl.int64)
        third = (keys >= bound + 3 * step).to(tl.int64)
        counts = tl.sum(first | (second << 21) | (third << 42), 0)
        one, two, three = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
        taken = (one >= k).to(tl.int32) + (two >= k).to(tl.int32) + (three >= k).to(tl.int32)
        reached = tl.where(taken == 3, three, tl.where(taken == 2, two, tl.where(taken == 1, one, reached)))
        bound += taken.to(tl.uint32) * step
        shift -= 2
    return bound


@triton.jit(do_not_specialize=["songs"])
def sample_kernel(
    logits_ptr, noise_ptr, temperature_ptr, topk_ptr, cfg_scale_ptr, length_ptr, least_ptr, out_ptr,
    songs, vocabulary, end,
    LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw the code of song `program_id(0)` of ``logits [2 · songs, vocabulary]``."""
    song = tl.program_id(0)
    dtype = logits_ptr.dtype.element_ty
    at = tl.arange(0, BLOCK)
    # Codes that end a song are, before its least length, as if there were no such codes.
    early = tl.load(length_ptr + song) < tl.load(least_ptr + song)
    codes = tl.where(early, tl.minimum(end, vocabulary), vocabulary)
    inside = at < codes
    scale = tl.load(cfg_scale_ptr + song)
    temperature = tl.load(temperature_ptr + song)
    greedy = temperature == 0
    k = tl.where(greedy, 1, tl.minimum(tl.load(topk_ptr + song), vocabulary))

    conditional = tl.load(logits_ptr + song * vocabulary + at, mask=inside, other=0).to(tl.float32)
    other_row = logits_ptr + (songs + song) * vocabulary
    unconditional = tl.load(other_row + at, mask=at < tl.where(scale == 1, 0, codes), other=0).to(tl.float32)
    # Every step is rounded as PyTorch rounds it.
    apart = (conditional - unconditional).to(dtype).to(tl.float32)
    apart = (apart * scale).to(dtype).to(tl.float32)
    logits = tl.where(scale == 1, conditional, (unconditional + apart).to(dtype).to(tl.float32))
    logits = tl.math.div_rn(logits, tl.where(greedy, 1.0, temperature) + tl.zeros_like(logits))
    logits = logits.to(dtype).to(tl.float32)

    # Keys of lanes without a code are 0, below that of −∞.
    keys = tl.where(inside, _ordered(logits), 0)
    logits = _value(keys)
    # A logit that is not a number stays, and makes every p one: the first code is drawn, as by PyTorch.
    kept = inside & ((keys >= _kth_largest(keys, k, LOWEST)) | (logits != logits))
    logits = tl.where(kept, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 0))
    total = tl.sum(weights, 0)
    p = tl.math.div_rn(weights, total + tl.zeros_like(weights))
    noise = tl.load(noise_ptr + song * vocabulary + at, mask=kept, other=1)
    race = tl.where(inside, tl.math.div_rn(p, tl.where(greedy, 1.0, noise)), -1.0)
    code = tl.argmax(race, 0, tie_break_left=True)
    tl.store(out_ptr + song, tl.where(total == total, code, 0).to(tl.int64))


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
    """Launch `sample_kernel`; arguments and result are those of the operator `sample`. V is below 2²¹."""
    songs, vocabulary = noise.shape
    assert vocabulary <= _LARGEST_VOCABULARY
    out = torch.empty(songs, dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(vocabulary)
    sample_kernel[(songs,)](
        logits.contiguous(), noise.contiguous(), temperature, topk, cfg_scale, length, least, out,
        songs, vocabulary, end,
        LOWEST=_LOWEST_BIT[logits.dtype], BLOCK=block, num_warps=min(max(block // 512, 1), 16),
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
