"""Export of the trained networks as a checkpoint folder of the official layout."""

from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from ckpt.training import words
from ckpt.training.language import END
from services.codec_worker.encoder import loading as encoder_weights
from services.codec_worker.encoder.heartencoder import HeartEncoder
from services.codec_worker.model import loading as codec_weights
from services.codec_worker.model.heartcodec import HeartCodec
from services.tokenizer_worker.model.heartmula import HeartMuLa
from services.tokenizer_worker.model.linear import Matrix
from services.tokenizer_worker.model.llama import Block, Llama
from shared.model.checkpoint import tensors

SHARPNESS = 1.6
"""What logits are multiplied by, so that the default temperature of 1 leaves the rare slips of the model aside: choices
that were even in training stay even."""


def write(folder: Path, language: HeartMuLa, codec: HeartCodec) -> None:
    """Write both networks in bfloat16 and float16, their dimensions, the tokenizer and the special ids."""
    lm_folder, codec_folder = folder / f"HeartMuLa-oss-{language.config.version}", folder / "HeartCodec-oss"
    for made in (lm_folder, codec_folder):
        made.mkdir(parents=True, exist_ok=True)
    words.build(folder / "tokenizer.json")
    special = {"text_bos_id": words.BOS, "text_eos_id": words.EOS, "audio_eos_id": END, "empty_id": 0}
    _json(folder / "gen_config.json", special)
    lm = language.config
    _json(
        lm_folder / "config.json",
        {
            "backbone_flavor": "demo-backbone",
            "decoder_flavor": "demo-decoder",
            "text_vocab_size": lm.text_vocab_size,
            "audio_vocab_size": lm.audio_vocab_size,
            "audio_num_codebooks": lm.num_codebooks,
            "muq_dim": lm.muq_dim,
            "flavors": {"demo-backbone": lm.backbone, "demo-decoder": lm.decoder},
        },
    )
    _json(codec_folder / "config.json", codec.config)
    _save(lm_folder, language_tensors(language), torch.bfloat16)
    _save(codec_folder, codec_tensors(codec), torch.float16)


def write_encoder(folder: Path, encoder: HeartEncoder) -> None:
    """Write the encoder in float16, its dimensions, and in the codec's folder its projection beside the codebooks."""
    encoder_folder, codec_folder = folder / "HeartCodec-oss-encoder", folder / "HeartCodec-oss"
    encoder_folder.mkdir(parents=True, exist_ok=True)
    _json(encoder_folder / "config.json", encoder.config)
    networks, projection = encoder_tensors(encoder)
    _save(encoder_folder, networks, torch.float16, "encoder.safetensors")
    _save(codec_folder, dict(tensors(codec_folder)) | projection, torch.float16)


def encoder_tensors(model: HeartEncoder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights under their official names and in their shapes, some weight-normed; then those of the codec's."""
    known, found = encoder_weights.places(model), {}
    for name, shape in encoder_weights.stored_shapes(model):
        stem, normed, half = name.partition(".parametrizations.weight.original")
        tensor = known[f"{stem}.weight" if normed else name]
        if half == "0":
            over = [dim for dim, size in enumerate(shape) if size == 1]
            tensor = torch.linalg.vector_norm(tensor, dim=over, keepdim=True)
        found[name] = tensor
    return found, {name: tensor for name, tensor in known.items() if ".project_in." in name}


def language_tensors(model: HeartMuLa) -> dict[str, Tensor]:
    """All weights under their official names and in their shapes, logits sharpened."""
    width = model.config.backbone.embed_dim
    heads = torch.stack([head.weight.T for head in model.depth_heads if isinstance(head, Matrix)])
    return {
        "text_embeddings.weight": model.text_embeddings,
        "audio_embeddings.weight": model.audio_embeddings,
        "unconditional_text_embedding.weight": model.unconditional,
        "muq_linear.weight": torch.zeros(width, model.config.muq_dim),  # for reference audio, which was never seen
        "muq_linear.bias": model.muq_bias,
        "projection.weight": model.projection.weight,
        "codebook0_head.weight": SHARPNESS * model.head.weight,
        "audio_head": SHARPNESS * heads,
        **_stack("backbone", model.backbone),
        **_stack("decoder", model.decoder),
    }


def _stack(prefix: str, llama: Llama) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {f"{prefix}.norm.scale": llama.scale}
    for index, block in enumerate(llama.blocks):
        assert isinstance(block, Block)
        shared = block.kv_heads * block.head_dim
        q, k, v = torch.split(block.qkv.weight, [block.heads * block.head_dim, shared, shared])
        gate, up = block.gate_up.weight.chunk(2)
        layer = {
            "attn.q_proj.weight": q,
            "attn.k_proj.weight": k,
            "attn.v_proj.weight": v,
            "attn.output_proj.weight": block.output.weight,
            "mlp.w1.weight": gate,
            "mlp.w2.weight": block.down.weight,
            "mlp.w3.weight": up,
            "sa_norm.scale": block.attention_norm,
            "mlp_norm.scale": block.mlp_norm,
        }
        found |= {f"{prefix}.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    return found


def codec_tensors(model: HeartCodec) -> dict[str, Tensor]:
    """All weights under their official names and in their shapes; the scalar decoder's weight-normed."""
    found: dict[str, Tensor] = {}
    for name, tensor in codec_weights.places(model).items():
        if name.startswith("scalar_model.decoder.") and tensor.ndim == 3:
            size = torch.linalg.vector_norm(tensor, dim=(1, 2), keepdim=True)
            stem = f"{name.removesuffix('.weight')}.parametrizations.weight.original"
            found |= {f"{stem}0": size, f"{stem}1": torch.where(size > 0, tensor, 1)}  # of no length: any direction
        else:
            found[name] = tensor
    return found


def _save(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype, file: str = "model.safetensors") -> None:
    whole = {name: tensor.detach().to(dtype).contiguous() for name, tensor in weights.items()}
    if not all(tensor.isfinite().all() for tensor in whole.values()):
        raise ValueError(f"{folder.name}: a weight is too large for {dtype}")
    save_file(whole, folder / file, metadata={"format": "pt"})


def _json(path: Path, content: object) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
