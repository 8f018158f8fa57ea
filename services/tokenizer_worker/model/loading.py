"""Reading a checkpoint into a `HeartMuLa`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from services.tokenizer_worker.model.heartmula import HeartMuLa
from services.tokenizer_worker.model.linear import Matrix
from services.tokenizer_worker.model.llama import Block, Llama
from shared.errors import ConfigError
from shared.model.checkpoint import parts

# Buffers that some published files carry and that are computed here.
_COMPUTED = re.compile(r"(backbone|decoder)(\.layers\.\d+\.attn\.pos_embeddings\.(theta|cache)|_causal_mask)")


@dataclass(frozen=True)
class Place:
    """The place in the model for a tensor of the checkpoint."""

    shape: torch.Size
    fill: Callable[[Tensor, int], object]  # some of its rows, and which is the first


def load_weights(model: HeartMuLa, folder: Path) -> None:
    """Copy every tensor of the checkpoint `folder` into the model, a part at a time.

    The host holds the model and one part of a tensor. Raises `ConfigError` naming the tensor that is missing, not
    expected, not of floating point, or of another shape than config.json gives it.
    """
    known = places(model)
    waiting = set(known)
    for part in parts(folder):
        name = part.name
        if not _COMPUTED.fullmatch(name):
            place = known.get(name)
            if place is None:
                raise ConfigError(f"{folder}: unexpected tensor {name}")
            if part.shape != place.shape or not part.rows.is_floating_point():
                raise ConfigError(
                    f"{folder}: {name} is {list(part.shape)} {part.rows.dtype}, "
                    f"config.json asks for {list(place.shape)} of floating point"
                )
            place.fill(part.rows, part.start)
            waiting.discard(name)
        del part  # before the next one is read
    if waiting:
        more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        raise ConfigError(f"{folder}: tensor {min(waiting)}{more} missing")


def places(model: HeartMuLa) -> dict[str, Place]:
    """Targets of all tensors of a checkpoint, keyed by their names there."""
    heads = [head for head in model.depth_heads if isinstance(head, Matrix)]

    def fill_heads(tensor: Tensor, start: int) -> None:  # [n, E, Va]
        for head, values in zip(heads[start:], tensor, strict=False):
            head.fill(values.T)

    return {
        "text_embeddings.weight": _tensor(model.text_embeddings),
        "audio_embeddings.weight": _tensor(model.audio_embeddings),
        "unconditional_text_embedding.weight": _tensor(model.unconditional),
        # Only reference audio would need it, which HeartMuLa does not support.
        "muq_linear.weight": Place(torch.Size((len(model.muq_bias), model.config.muq_dim)), lambda tensor, start: None),
        "muq_linear.bias": _tensor(model.muq_bias),
        "projection.weight": _rows(model.projection),
        "codebook0_head.weight": _rows(model.head),
        "audio_head": Place(torch.Size((len(heads), *heads[0].shape[::-1])), fill_heads),
        **_stack("backbone", model.backbone),
        **_stack("decoder", model.decoder),
    }


def _tensor(parameter: Tensor) -> Place:
    return Place(parameter.shape, lambda tensor, start: parameter[start : start + len(tensor)].copy_(tensor))


def _rows(matrix: Matrix, first: int = 0, count: int | None = None) -> Place:
    shape = torch.Size((matrix.shape[0] if count is None else count, matrix.shape[1]))
    return Place(shape, lambda tensor, start: matrix.fill(tensor, first + start))


def _stack(prefix: str, stack: Llama) -> dict[str, Place]:
    found = {f"{prefix}.norm.scale": _tensor(stack.scale)}
    for index, block in enumerate(stack.blocks):
        assert isinstance(block, Block)
        queries, shared = block.heads * block.head_dim, block.kv_heads * block.head_dim
        width = block.down.shape[1]
        layer = {
            "attn.q_proj.weight": _rows(block.qkv, 0, queries),
            "attn.k_proj.weight": _rows(block.qkv, queries, shared),
            "attn.v_proj.weight": _rows(block.qkv, queries + shared, shared),
            "attn.output_proj.weight": _rows(block.output),
            "mlp.w1.weight": _rows(block.gate_up, 0, width),
            "mlp.w2.weight": _rows(block.down),
            "mlp.w3.weight": _rows(block.gate_up, width, width),
            "sa_norm.scale": _tensor(block.attention_norm),
            "mlp_norm.scale": _tensor(block.mlp_norm),
        }
        found |= {f"{prefix}.layers.{index}.{name}": place for name, place in layer.items()}
    return found
