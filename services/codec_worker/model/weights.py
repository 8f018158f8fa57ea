"""Loading the official codec checkpoint: names, weight norm, and what decoding does without."""

import re
from pathlib import Path

import torch
from torch import Tensor

from services.codec_worker.model.heartcodec import HeartCodec
from shared.checkpoint import tensors
from shared.errors import ConfigError

_UNUSED = re.compile(
    r"scalar_model\.encoder\."
    r"|flow_matching\.zero_cond_embedding1$"  # stands in for masked conditioning, which decoding never masks
    r"|flow_matching\.vq_embed\.project_in\."
    r"|flow_matching\.vq_embed\.layers\.\d+\._codebook\.(embed_avg|cluster_size|initted)$"
)
_RENAMED = (
    (r"^scalar_model\.decoder\.", "scalar.decoder."),
    (r"^flow_matching\.vq_embed\.project_out\.", "quantizer.project_out."),
    (r"^flow_matching\.cond_feature_emb\.", "quantizer.cond_feature_emb."),
    (r"^flow_matching\.estimator\.", "estimator."),
    (r"\.emb\.timestep_embedder\.", "."),
    (r"\.(attn|mlp)\.", "."),
    (r"\.(attn_norm|mlp_norm)\.weight$", r".\1"),
    (r"\.layer\.", "."),
)
_CODEBOOK = re.compile(r"flow_matching\.vq_embed\.layers\.(\d+)\._codebook\.embed$")
_WEIGHT_NORM = re.compile(r"^(.*)\.parametrizations\.weight\.original([01])$")


@torch.no_grad()
def load_weights(model: HeartCodec, folder: Path) -> None:
    """Fill a model on the CPU from a checkpoint folder, each tensor straight into its place and dtype.

    Raises `ConfigError` naming the tensor that is missing, unexpected or of another shape.
    """
    places = dict(model.named_parameters())
    left = set(places) - {"quantizer.embed"}
    books = set(range(model.config.num_quantizers))
    halves: dict[str, dict[str, Tensor]] = {}  # weight-normed tensors of which one half has been read

    def put(source: str, name: str, tensor: Tensor) -> None:
        if name not in left:
            raise ConfigError(f"{folder}: unexpected tensor {source}")
        _copy(folder, source, places[name], tensor)
        left.discard(name)

    for source, tensor in tensors(folder):
        if _UNUSED.match(source):
            continue
        if book := _CODEBOOK.match(source):
            index = int(book[1])
            if index not in books:
                raise ConfigError(f"{folder}: unexpected tensor {source}")
            _copy(folder, source, places["quantizer.embed"][index], tensor[0])
            books.discard(index)
            continue
        name = source
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if normed := _WEIGHT_NORM.match(name):
            pair = halves.setdefault(normed[1], {})
            pair[normed[2]] = tensor.float()
            if len(pair) == 2:
                put(source, f"{normed[1]}.weight", _fold(pair["0"], pair["1"]))
                del halves[normed[1]]
        else:
            put(source, name, tensor)
    missing = sorted(left) + [f"codebook {n}" for n in sorted(books)]
    if missing:
        raise ConfigError(f"{folder}: {len(missing)} tensors are missing, among them {missing[0]}")


def _fold(magnitude: Tensor, direction: Tensor) -> Tensor:
    """Weight norm (Salimans & Kingma 2016) over all dimensions but the first: g · v / ‖v‖, fp32."""
    norm: Tensor = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.ndim)), keepdim=True)
    return direction * (magnitude / norm)


def _copy(folder: Path, source: str, place: Tensor, tensor: Tensor) -> None:
    if place.shape != tensor.shape:
        raise ConfigError(f"{folder}: {source} is {list(tensor.shape)}, the configuration says {list(place.shape)}")
    place.copy_(tensor)
