"""Loading of the official codec checkpoint: names, weight norm, and tensors that decoding does not need."""

import re
from pathlib import Path

import torch
from torch import Tensor

from services.codec_worker.model.heartcodec import HeartCodec
from shared.errors import ConfigError
from shared.model.checkpoint import tensors

_UNUSED = re.compile(
    r"scalar_model\.encoder\."
    r"|flow_matching\.zero_cond_embedding1$"  # stands in for masked conditioning, which decoding never masks
    r"|flow_matching\.vq_embed\.project_in\."
    r"|flow_matching\.vq_embed\.layers\.\d+\._codebook\.(embed_avg|cluster_size|initted)$"
)
_OFFICIAL = (  # how the checkpoint calls what the model calls otherwise
    (r"^quantizer\.project_out\.", "flow_matching.vq_embed.project_out."),
    (r"^quantizer\.cond_feature_emb\.", "flow_matching.cond_feature_emb."),
    (r"^estimator\.", "flow_matching.estimator."),
    (r"\.(adaln_single|adaln_single_2)\.(linear_[12])\.", r".\1.emb.timestep_embedder.\2."),
    (r"\.([qkvo]_proj)\.", r".attn.\1."),
    (r"\.(proj_in|connection_proj|proj_out)\.(weight|bias)$", r".\1.ffn_1.\2"),
    (r"\.(proj_in|connection_proj|proj_out)\.linear\.", r".\1.ffn_2."),
    (r"\.(gate|up|down)\.", r".mlp.\1."),
    (r"\.(attn_norm|mlp_norm)$", r".\1.weight"),
    (r"^scalar\.decoder\.", "scalar_model.decoder."),
    (r"\.up_conv\.", ".up_conv.layer."),
)
_CODEBOOKS = "quantizer.embed"
_CODEBOOK = "flow_matching.vq_embed.layers.{}._codebook.embed"
_QKV = "qkv.weight"
_WEIGHT_NORM = ".parametrizations.weight.original"  # 0: magnitude, 1: direction


@torch.no_grad()
def load_weights(model: HeartCodec, folder: Path) -> None:
    """Fill a model in host memory from a checkpoint folder, each tensor straight into its place and dtype.

    Raises `ConfigError` with the checkpoint's name of a tensor that is missing, unexpected or of another shape.
    """
    known = places(model)
    left = set(known)
    halves: dict[str, dict[str, Tensor]] = {}  # weight-normed tensors of which one half has been read

    def put(source: str, name: str, tensor: Tensor) -> None:
        if name not in left:
            raise ConfigError(f"{folder}: unexpected tensor {source}")
        _check(folder, source, tensor, list(known[name].shape))
        known[name].copy_(tensor)
        left.discard(name)

    for source, tensor in tensors(folder):
        if _UNUSED.match(source):
            continue
        stem, normed, half = source.partition(_WEIGHT_NORM)
        if not normed:
            put(source, source, tensor)
            continue
        pair = halves.setdefault(stem, {})
        pair[half] = tensor.float()
        if pair.keys() == {"0", "1"}:
            _check(folder, f"{stem}{_WEIGHT_NORM}0", pair["0"], [len(pair["1"])] + [1] * (pair["1"].ndim - 1))
            put(f"{stem}{_WEIGHT_NORM}1", f"{stem}.weight", _fold(pair["0"], pair["1"]))
            del halves[stem]
    for stem, pair in halves.items():
        left.discard(f"{stem}.weight")
        left |= {f"{stem}{_WEIGHT_NORM}{half}" for half in {"0", "1"} - pair.keys()}
    if left:
        raise ConfigError(f"{folder}: {len(left)} tensors are missing, among them {min(left)}")


def places(model: HeartCodec) -> dict[str, Tensor]:
    """Parameters of the model under the checkpoint's names and in its shapes, weight norm folded."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        place: Tensor = parameter
        if parameter.ndim == 3 and name != _CODEBOOKS:  # convolutions keep their inputs last
            place = parameter.permute(2, 1, 0) if ".up_conv." in name else parameter.transpose(1, 2)
        parts = {name: place}
        if name == _CODEBOOKS:
            parts = {_CODEBOOK.format(n): parameter[n : n + 1] for n in range(len(parameter))}
        elif name.endswith(_QKV):
            stem = name.removesuffix(_QKV)
            parts = {f"{stem}{part}_proj.weight": third for part, third in zip("qkv", parameter.chunk(3), strict=True)}
        for part, place in parts.items():
            for pattern, official in _OFFICIAL:
                part = re.sub(pattern, official, part)
            found[part] = place
    return found


def _check(folder: Path, source: str, tensor: Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise ConfigError(f"{folder}: {source} is {list(tensor.shape)}, expected {shape}")


def _fold(magnitude: Tensor, direction: Tensor) -> Tensor:
    """Fold weight norm (Salimans & Kingma 2016) over all dimensions but the first: g · v / ‖v‖, fp32."""
    norm: Tensor = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.ndim)), keepdim=True)
    return direction * (magnitude / norm)
