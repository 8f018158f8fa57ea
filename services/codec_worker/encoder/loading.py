"""Loading of the encoder's official checkpoint, and of the codebooks, which lie in the decoder's."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from services.codec_worker.encoder.heartencoder import HeartEncoder
from shared.errors import ConfigError
from shared.model.checkpoint import Checkpoint, tensors
from shared.model.encoder_config import MU_LAYERS, WAVLM_LAYERS, EncoderConfig

_EXTRACTORS = "encoder.feature_extractors."
_OFFICIAL = (  # how the checkpoint calls what the model calls otherwise
    (r"^(wavlm|whisper)\.", _EXTRACTORS + r"\1_encoder."),
    (r"^muencoder\.", _EXTRACTORS + "muencoder."),
    (r"wavlm_encoder\.(layers|layer_norm)\.", r"wavlm_encoder.encoder.\1."),
    (r"\.pos_conv\.", ".encoder.pos_conv_embed.conv."),
    (r"\.rel_attn_embed$", ".encoder.layers.0.attention.rel_attn_embed.weight"),
    (r"\.embed_positions$", ".embed_positions.weight"),
    (r"^query\.", "encoder.query."),
    (r"^(encoder\.query)\.layers\.", r"\1.encoder_transformers."),
    (r"\.(to_qkv|to_out|q_norm|k_norm)\.", r".self_attn.\1."),
    (r"\.attention_scale$", ".self_attn_scale.scale"),
    (r"\.ff_scale$", ".ff_scale.scale"),
    (r"(encoder_transformers\.\d+)\.proj\.", r"\1.ff.ff.0.proj."),
    (r"(encoder_transformers\.\d+)\.down\.", r"\1.ff.ff.2."),
    (r"^quantizer\.project_in\.", "flow_matching.vq_embed.project_in."),
)
_CODEBOOKS = "quantizer.embed"
_CODEBOOK = "flow_matching.vq_embed.layers.{}._codebook.embed"
_OF_THE_DECODER = re.compile(r"flow_matching\.vq_embed\.(project_in\.(weight|bias)|layers\.\d+\._codebook\.embed)")
_WEIGHT_NORM = ".parametrizations.weight.original"  # 0: magnitude, 1: direction
_NORMED = re.compile(r"encoder_transformers\.\d+\.(self_attn\.to_(qkv|out)|ff\.ff\.(0\.proj|2))\.weight$")
_NORMED_BY_TAP = re.compile(r"wavlm_encoder\.encoder\.pos_conv_embed\.conv\.weight$")


@torch.no_grad()
def load_encoder(model: HeartEncoder, checkpoint: Checkpoint) -> None:
    """Fill a model in host memory: the networks from the encoder's folder, the codebooks from the codec's.

    Raises `ConfigError` with the checkpoint's name of a tensor that is missing, unexpected or of another shape.
    """
    known = places(model)
    codebooks = {name: place for name, place in known.items() if _OF_THE_DECODER.fullmatch(name)}
    networks = {name: place for name, place in known.items() if name not in codebooks}
    _Loader(checkpoint.encoder_path, networks).load(_without_unused(checkpoint.encoder_path, model.config))
    _Loader(checkpoint.codec_path, codebooks).load(tensors(checkpoint.codec_path, _OF_THE_DECODER))


def places(model: HeartEncoder) -> dict[str, Tensor]:
    """Parameters of the model under the checkpoints' names and in their shapes, weight norm folded."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name == _CODEBOOKS:
            found |= {_CODEBOOK.format(n): parameter[n : n + 1] for n in range(len(parameter))}
            continue
        official = name
        for pattern, replacement in _OFFICIAL:
            official = re.sub(pattern, replacement, official)
        found[official] = _as_stored(name, parameter)
    return found


def stored_shapes(model: HeartEncoder) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of the tensors that the encoder's folder must have, weight norm not folded."""
    for name, place in places(model).items():
        magnitude, stem = _magnitude(name, place), name.removesuffix(".weight") + _WEIGHT_NORM
        if _OF_THE_DECODER.fullmatch(name):
            continue
        if magnitude is None:
            yield name, place.shape
        else:
            yield from ((stem + "0", torch.Size(magnitude)), (stem + "1", place.shape))


def codebook_shapes(model: HeartEncoder) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of the tensors that the codec's folder must have for the encoder."""
    return ((name, place.shape) for name, place in places(model).items() if _OF_THE_DECODER.fullmatch(name))


def _as_stored(name: str, parameter: Tensor) -> Tensor:
    """A parameter in the shape and order of the checkpoint: convolutions there have their inputs second."""
    if ".pointwise_conv" in name:
        return parameter[:, :, None]
    if parameter.ndim == 4 and ".conv.conv." in name:
        return parameter.permute(0, 3, 1, 2)
    grouped = "depthwise_conv" in name or "pos_conv" in name
    return parameter.transpose(1, 2) if parameter.ndim == 3 and not grouped else parameter


def _magnitude(name: str, place: Tensor) -> list[int] | None:
    """Shape of a weight-normed tensor's magnitude; None for one without weight norm.

    A linear layer has one for each output, WavLM's convolution by position one for each tap of its kernel.
    """
    if _NORMED_BY_TAP.search(name):
        return [1, 1, place.shape[2]]
    return [place.shape[0], 1] if _NORMED.search(name) else None


def _without_unused(folder: Path, config: EncoderConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the encoder's folder but for those that encoding does not need."""
    conformer, wavlm = config.mu.conformer_config.num_hidden_layers, config.wavlm.num_hidden_layers
    patterns = (
        r".*\.(num_batches_tracked|inv_freq)",
        rf"{_EXTRACTORS}muencoder\.preprocessor_melspec_2048\..*",
        rf"{_EXTRACTORS}muencoder\.conformer\.(pos_conv_embed|layer_norm)\..*",
        *(rf"{_EXTRACTORS}muencoder\.conformer\.layers\.{n}\..*" for n in range(MU_LAYERS, conformer)),
        rf"{_EXTRACTORS}wavlm_encoder\.masked_spec_embed",
        *(rf"{_EXTRACTORS}wavlm_encoder\.encoder\.layers\.{n}\..*" for n in range(WAVLM_LAYERS, wavlm)),
    )
    return tensors(folder, re.compile(f"(?!({'|'.join(patterns)})$).*"))


class _Loader:
    """Writes tensors into their places."""

    def __init__(self, folder: Path, known: dict[str, Tensor]) -> None:
        self._folder, self._known = folder, known
        self._left = set(known)
        self._halves: dict[str, dict[str, Tensor]] = {}  # weight-normed tensors of which one half has been read

    def load(self, stored: Iterator[tuple[str, Tensor]]) -> None:
        """Write all that is stored. Raises `ConfigError`."""
        for source, tensor in stored:
            stem, normed, half = source.partition(_WEIGHT_NORM)
            if normed:
                self._put_half(stem, half, tensor)
            else:
                self._put(source, source, tensor)
        if self._halves:
            stem, pair = min(self._halves.items())
            (half,) = {"0", "1"} - pair.keys()
            raise ConfigError(f"{self._folder}: {stem}{_WEIGHT_NORM}{half} is missing")
        if self._left:
            raise ConfigError(f"{self._folder}: {len(self._left)} tensors are missing, among them {min(self._left)}")

    def _put(self, source: str, name: str, tensor: Tensor) -> None:
        if name not in self._left:
            raise ConfigError(f"{self._folder}: unexpected tensor {source}")
        self._check(source, tensor, list(self._known[name].shape))
        self._known[name].copy_(tensor)
        self._left.discard(name)

    def _put_half(self, stem: str, half: str, tensor: Tensor) -> None:
        name = f"{stem}.weight"
        shape = _magnitude(name, self._known[name]) if name in self._left else None
        if shape is None or half not in ("0", "1"):
            raise ConfigError(f"{self._folder}: unexpected tensor {stem}{_WEIGHT_NORM}{half}")
        if half == "0":
            self._check(f"{stem}{_WEIGHT_NORM}0", tensor, shape)
        pair = self._halves.setdefault(stem, {})
        pair[half] = tensor.float()
        if pair.keys() == {"0", "1"}:
            del self._halves[stem]
            self._put(f"{stem}{_WEIGHT_NORM}1", name, _fold(pair["0"], pair["1"]))

    def _check(self, source: str, tensor: Tensor, shape: list[int]) -> None:
        if list(tensor.shape) != shape:
            raise ConfigError(f"{self._folder}: {source} is {list(tensor.shape)}, expected {shape}")


def _fold(magnitude: Tensor, direction: Tensor) -> Tensor:
    """Fold weight norm (Salimans & Kingma 2016): g · v / ‖v‖, the norm over the dimensions that g lacks, fp32."""
    over = tuple(n for n, size in enumerate(magnitude.shape) if size == 1)
    norm: Tensor = torch.linalg.vector_norm(direction, dim=over, keepdim=True)
    return direction * (magnitude / norm)
