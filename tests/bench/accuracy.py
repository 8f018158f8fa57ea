"""Accuracy of smaller weights: logits and greedy choices beside those of another precision, along the same song."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from services.tokenizer_worker.model import HeartMuLa, Sampler, load_weights
from services.tokenizer_worker.model.kernels import int8_product
from shared.model.checkpoint import Checkpoint
from shared.model.prompt import Prompt

CFG = 1.5


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The form in which a model keeps its weights."""

    dtype: torch.dtype
    int8: tuple[str, ...] = ()
    operator: bool = False  # products of few rows by the operator's plain path, which rounds as the kernel on CUDA does


PRECISIONS = {
    "float32": Precision(dtype=torch.float32),
    "bfloat16": Precision(dtype=torch.bfloat16),
    "int8 decoder": Precision(dtype=torch.bfloat16, int8=("decoder",)),
    "int8 all": Precision(dtype=torch.bfloat16, int8=("backbone", "decoder")),
    "int8 all, as on CUDA": Precision(dtype=torch.bfloat16, int8=("backbone", "decoder"), operator=True),
}


class Listener:
    """A model that is given a song frame by frame, and reports what it would have chosen."""

    def __init__(self, checkpoint: Checkpoint, precision: Precision) -> None:
        self.model = HeartMuLa(checkpoint.lm, precision.dtype, precision.int8)
        load_weights(self.model, checkpoint.lm_path)
        self._guide = Sampler([0], [1], [CFG]).guide

    def hear(self, prompt: Prompt, codes: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """Guided logits fp32 ``[8, Va]`` of each frame; then that of `codes`, int64 ``[8]``, is fed, or its own greedy
        one where there is None."""
        model, positions = self.model, prompt.length
        cache, depth = model.backbone_cache(2, positions + len(codes)), model.depth_cache(2)
        hidden = model.advance(model.embed_prompt(prompt.tags, prompt.lyrics, 2), cache, 0)
        for index, given in enumerate(codes):
            seen: list[Tensor] = []

            def choose(book: int, logits: Tensor, given: Tensor | None = given, seen: list[Tensor] = seen) -> Tensor:
                seen.append(self._guide(logits)[0].float())
                return (seen[-1].argmax() if given is None else given[book])[None]

            frame = model.frame(hidden, depth, choose)
            yield torch.stack(seen)
            hidden = model.advance(model.embed_frames(frame)[None].expand(2, -1, -1), cache, positions + index)


@torch.inference_mode()
def accuracy(checkpoint: Checkpoint, prompts: list[Prompt], frames: int) -> Iterator[dict[str, object]]:
    """For each precision, along greedy songs of the bfloat16 model: how far its logits are from that model's, as a part
    of their standard deviation, and how often it would have chosen the same code."""
    reference = Listener(checkpoint, PRECISIONS["bfloat16"])
    songs = [torch.stack(list(reference.hear(prompt, [None] * frames))) for prompt in prompts]  # [T, 8, Va]
    for name, precision in PRECISIONS.items():
        listener = Listener(checkpoint, precision)
        apart, largest, same = [], [], []
        for prompt, expected in zip(prompts, songs, strict=True):
            with patch.object(torch, "_weight_int8pack_mm", int8_product) if precision.operator else nullcontext():
                logits = torch.stack(list(listener.hear(prompt, expected.argmax(-1).unbind(0))))
            scale = expected.std(-1, keepdim=True)
            difference = (logits - expected).abs() / scale
            apart.append(difference.mean())
            largest.append(difference.max())
            same.append((logits.argmax(-1) == expected.argmax(-1)).float().mean())
        weights = sum(parameter.nbytes for parameter in listener.model.parameters())
        yield {
            "weights": name,
            "weights_mb": round(weights / 1e6, 1),
            "logits_apart": round(float(torch.stack(apart).mean()), 4),
            "logits_apart_max": round(float(torch.stack(largest).max()), 3),
            "same_greedy": round(float(torch.stack(same).mean()), 4),
        }
