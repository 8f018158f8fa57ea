"""Reading a checkpoint into a `HeartMuLa`."""

import re
from pathlib import Path

import torch
from torch import Tensor

from services.tokenizer_worker.model.heartmula import HeartMuLa
from services.tokenizer_worker.model.llama import Block, Llama
from shared.checkpoint import tensors
from shared.errors import ConfigError

# Buffers that some published files carry and that are computed here.
_COMPUTED = re.compile(r"(backbone|decoder)(\.layers\.\d+\.attn\.pos_embeddings\.(theta|cache)|_causal_mask)")


def load_weights(model: HeartMuLa, folder: Path) -> None:
    """Copy every tensor of the checkpoint `folder` into its place, in the model's dtype, one at a time.

    So the host holds the model and one tensor. Raises `ConfigError` naming the tensor that is missing, not expected,
    not of floating point, or of another shape than config.json gives it.
    """
    waiting = _places(model)
    for name, tensor in tensors(folder):
        if not _COMPUTED.fullmatch(name):
            place = waiting.pop(name, None)
            if place is None:
                raise ConfigError(f"{folder}: unexpected tensor {name}")
            if tensor.shape != place.shape or not tensor.is_floating_point():
                raise ConfigError(
                    f"{folder}: {name} is {list(tensor.shape)} {tensor.dtype}, "
                    f"config.json asks for {list(place.shape)} of floating point"
                )
            if not place.is_meta:
                place.copy_(tensor)
        del tensor  # before the next one is read
    if waiting:
        more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        raise ConfigError(f"{folder}: tensor {min(waiting)}{more} missing")


def _places(model: HeartMuLa) -> dict[str, Tensor]:
    """Where each tensor of the checkpoint goes: views of the parameters, in the checkpoint's shapes."""
    return {
        "text_embeddings.weight": model.text_embeddings,
        "audio_embeddings.weight": model.audio_embeddings,
        "unconditional_text_embedding.weight": model.unconditional,
        # Only reference audio would need it, which HeartMuLa does not support.
        "muq_linear.weight": torch.empty(len(model.muq_bias), model.config.muq_dim, device="meta"),
        "muq_linear.bias": model.muq_bias,
        "projection.weight": model.projection,
        "codebook0_head.weight": model.head,
        "audio_head": model.depth_heads.transpose(1, 2),
        **_stack("backbone", model.backbone),
        **_stack("decoder", model.decoder),
    }


def _stack(prefix: str, stack: Llama) -> dict[str, Tensor]:
    places: dict[str, Tensor] = {f"{prefix}.norm.scale": stack.scale}
    for index, block in enumerate(stack.blocks):
        assert isinstance(block, Block)
        shared = block.kv_heads * block.head_dim
        q, k, v = block.qkv[: -2 * shared], block.qkv[-2 * shared : -shared], block.qkv[-shared:]
        gate, up = block.gate_up.chunk(2)
        layer = {
            "attn.q_proj.weight": q,
            "attn.k_proj.weight": k,
            "attn.v_proj.weight": v,
            "attn.output_proj.weight": block.output,
            "mlp.w1.weight": gate,
            "mlp.w2.weight": block.down,
            "mlp.w3.weight": up,
            "sa_norm.scale": block.attention_norm,
            "mlp_norm.scale": block.mlp_norm,
        }
        places |= {f"{prefix}.layers.{index}.{name}": place for name, place in layer.items()}
    return places
